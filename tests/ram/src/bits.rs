// SPDX-License-Identifier: GPL-2.0

//! A set of page numbers.

/// The set; numbers run from 0 up to a length that is given once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bits {
    words: Vec<u64>,
    length: u64,
}

impl Bits {
    /// An empty set of numbers below `length`.
    pub fn new(length: u64) -> Self {
        Self {
            words: vec![0; length.div_ceil(64) as usize],
            length,
        }
    }

    /// The set in `words`, least significant bit first. Bits from `length` on are an error of whoever
    /// made them: the first of them is returned.
    pub fn from_words(words: &[u64], length: u64) -> Result<Self, u64> {
        let all = Self {
            words: words.to_vec(),
            length: words.len() as u64 * 64,
        };
        if let Some(beyond) = all.iter().find(|&n| n >= length) {
            return Err(beyond);
        }
        let mut set = all;
        set.words.resize(length.div_ceil(64) as usize, 0);
        set.length = length;
        Ok(set)
    }

    /// Numbers in the set are below this.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Adds a number below the length.
    pub fn insert(&mut self, n: u64) {
        assert!(n < self.length, "page {n} of {}", self.length);
        self.words[(n / 64) as usize] |= 1 << (n % 64);
    }

    /// Whether a number is in the set.
    pub fn contains(&self, n: u64) -> bool {
        n < self.length && self.words[(n / 64) as usize] >> (n % 64) & 1 == 1
    }

    /// Adds all that is in `other`.
    pub fn merge(&mut self, other: &Self) {
        for (word, more) in self.words.iter_mut().zip(&other.words) {
            *word |= more;
        }
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|w| u64::from(w.count_ones())).sum()
    }

    /// All of them, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        self.words.iter().enumerate().flat_map(|(at, &word)| {
            let mut left = word;
            std::iter::from_fn(move || {
                let bit = (left != 0).then(|| left.trailing_zeros())?;
                left &= left - 1;
                Some(at as u64 * 64 + u64::from(bit))
            })
        })
    }

    /// The smallest number that is in this set and not in `other`.
    pub fn first_not_in(&self, other: &Self) -> Option<u64> {
        self.iter().find(|&n| !other.contains(n))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_come_out_as_they_went_in() {
        let mut set = Bits::new(200);
        for n in [199, 0, 63, 64, 128, 63] {
            set.insert(n);
        }
        assert_eq!(set.iter().collect::<Vec<_>>(), [0, 63, 64, 128, 199]);
        assert_eq!(set.count(), 5);
        let mut other = set.clone();
        other.insert(1);
        assert_eq!(other.first_not_in(&set), Some(1));
        assert_eq!(set.first_not_in(&other), None);
        set.merge(&other);
        assert_eq!(set, other);
    }

    #[test]
    fn bits_beyond_the_end_are_found() {
        assert_eq!(Bits::from_words(&[0, 1 << 6], 70), Err(70));
        let set = Bits::from_words(&[1, 1 << 5, 0, 0], 70);
        assert_eq!(set.map(|s| s.iter().collect()), Ok(vec![0, 69]));
    }
}
