// SPDX-License-Identifier: GPL-2.0-or-later

//! Learned costs against true ones.

use proptest::prelude::*;
use remus_core::cost::Cost;

/// Teaches the cost of calls for one page and for many, with some noise and now and then an interruption.
fn taught(call: u64, page: u64, noise: &[(u8, u8)]) -> Cost {
    let mut cost = Cost::new();
    for &(n, interrupted) in noise.iter().cycle().take(600) {
        let late = if interrupted == 0 { 1_000_000_000 } else { 0 };
        let percent = 90 + u64::from(n % 21);
        let many = 8 + u64::from(n) * 2;
        cost.learn(1, (call + page) * percent / 100 + late);
        cost.learn(many, (call + many * page) * percent / 100);
    }
    cost
}

proptest! {
    #[test]
    fn finds_the_ratio(
        page in 20u64..5_000,
        ratio in 1u64..60,
        noise in prop::collection::vec((any::<u8>(), any::<u8>()), 64),
    ) {
        let gap = taught(page * ratio, page, &noise).gap();
        prop_assert!(gap * 2 + 1 >= ratio, "gap {gap}, ratio {ratio}");
        prop_assert!(gap <= ratio * 2 + 1, "gap {gap}, ratio {ratio}");
    }

    /// A machine that changes, such as one that moves to another host, is learned anew.
    #[test]
    fn forgets(noise in prop::collection::vec((any::<u8>(), 1u8..), 64)) {
        let mut cost = taught(100_000, 2_000, &noise);
        prop_assert!(cost.gap() >= 25);
        for _ in 0..600 {
            cost.learn(1, 200);
            cost.learn(64, 100 + 64 * 100);
        }
        prop_assert!(cost.gap() <= 2, "{cost:?}");
    }

    /// Whatever the clock says.
    #[test]
    fn takes_anything(samples in prop::collection::vec((any::<u64>(), any::<u64>()), 0..200)) {
        let mut cost = Cost::new();
        for (pages, ns) in samples {
            cost.learn(pages, ns);
            cost.learn(1, ns);
            prop_assert!(cost.gap() <= 64);
        }
    }
}
