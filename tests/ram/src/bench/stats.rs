// SPDX-License-Identifier: GPL-2.0

//! Rounds of measurements, and the figures that come of them.

use serde_json::{json, Map, Value};

/// One quantity, once a round.
#[derive(Clone, Debug, Default)]
pub struct Series(Vec<f64>);

impl Series {
    /// Adds what a round came to.
    pub fn push(&mut self, value: impl Into<f64>) {
        self.0.push(value.into());
    }

    /// The same quantity in another unit.
    pub fn times(&self, factor: f64) -> Self {
        Self(self.0.iter().map(|v| v * factor).collect())
    }

    /// Round by round, this divided by another.
    pub fn over(&self, other: &Self) -> Self {
        Self(self.0.iter().zip(&other.0).map(|(a, b)| a / b).collect())
    }

    /// Round by round, the smaller of the two.
    pub fn least(&self, other: &Self) -> Self {
        Self(
            self.0
                .iter()
                .zip(&other.0)
                .map(|(a, b)| a.min(*b))
                .collect(),
        )
    }

    /// The middle one.
    pub fn median(&self) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        match sorted.len() {
            0 => f64::NAN,
            n if n % 2 == 1 => sorted[n / 2],
            n => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
        }
    }

    fn json(&self) -> Map<String, Value> {
        let fold = |f: fn(f64, f64) -> f64| self.0.iter().copied().reduce(f);
        [
            ("value", json!(self.median())),
            ("min", json!(fold(f64::min))),
            ("max", json!(fold(f64::max))),
            ("values", json!(self.0)),
        ]
        .into_iter()
        .map(|(name, value)| (name.into(), value))
        .collect()
    }
}

/// What a figure should be.
#[derive(Clone, Copy, Debug)]
pub enum Target {
    /// At most so much.
    AtMost(f64),
    /// At least so much.
    AtLeast(f64),
    /// Whatever it is.
    None,
}

/// A ratio and the absolute values that it comes from.
pub struct Figure {
    value: Map<String, Value>,
    absolute: Map<String, Value>,
}

impl Figure {
    /// The median of the rounds' ratios. `what` says what is divided by what.
    pub fn new(ratio: &Series, target: Target, what: &str) -> Self {
        let mut value = ratio.json();
        let median = ratio.median();
        let (bound, met) = match target {
            Target::AtMost(most) => (json!(format!("<= {most}")), json!(median <= most)),
            Target::AtLeast(least) => (json!(format!(">= {least}")), json!(median >= least)),
            Target::None => (Value::Null, Value::Null),
        };
        value.insert("target".into(), bound);
        value.insert("met".into(), met);
        value.insert("what".into(), json!(what));
        Self {
            value,
            absolute: Map::new(),
        }
    }

    /// With an absolute value beside it.
    #[must_use]
    pub fn beside(mut self, label: &str, unit: &str, series: &Series) -> Self {
        let mut entry = series.json();
        entry.insert("unit".into(), json!(unit));
        self.absolute.insert(label.into(), entry.into());
        self
    }

    /// As it goes into the report.
    pub fn json(mut self) -> Value {
        self.value.insert("absolute".into(), self.absolute.into());
        self.value.into()
    }
}

/// How much `y` grows with each unit of `x`, by least squares.
pub fn slope(points: &[(f64, f64)]) -> f64 {
    let n = points.len() as f64;
    let mean = |f: fn(&(f64, f64)) -> f64| points.iter().map(f).sum::<f64>() / n;
    let (x, y) = (mean(|p| p.0), mean(|p| p.1));
    let both: f64 = points.iter().map(|p| (p.0 - x) * (p.1 - y)).sum();
    both / points.iter().map(|p| (p.0 - x).powi(2)).sum::<f64>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_slopes() {
        assert_eq!(Series(vec![3.0, 1.0, 2.0]).median(), 2.0);
        assert_eq!(Series(vec![4.0, 1.0, 2.0, 3.0]).median(), 2.5);
        let line = [(500.0, 3.0), (2000.0, 6.0), (8000.0, 18.0)];
        assert!((slope(&line) - 0.002).abs() < 1e-9);
    }
}
