//! Latencies, counted in buckets whose width grows with the value.

/// Buckets per doubling: values are kept to within one part in eight.
const PER_DOUBLING: u64 = 8;
/// 8 exact buckets and 8 for each doubling up to 2^40 ns (18 minutes).
const BUCKETS: usize = 8 * 39;

/// A histogram of latencies in nanoseconds.
#[derive(Clone, Debug)]
pub struct Histogram {
    buckets: [u32; BUCKETS],
    count: u64,
    max_ns: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self::new()
    }
}

impl Histogram {
    /// An empty histogram.
    pub const fn new() -> Self {
        Self {
            buckets: [0; BUCKETS],
            count: 0,
            max_ns: 0,
        }
    }

    /// Counts one latency.
    pub fn add(&mut self, ns: u64) {
        let bucket = &mut self.buckets[bucket_of(ns)];
        *bucket = bucket.saturating_add(1);
        self.count += 1;
        self.max_ns = self.max_ns.max(ns);
    }

    /// How many were counted.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The largest, exactly; 0 if none was counted.
    pub fn max_ns(&self) -> u64 {
        self.max_ns
    }

    /// The value that `per_mille` of 1000 latencies do not exceed, rounded up
    /// to its bucket's end (but not past the largest); 0 if none was counted.
    pub fn percentile_ns(&self, per_mille: u64) -> u64 {
        let wanted = (self.count * per_mille).div_ceil(1000).max(1);
        let mut seen = 0;
        for (i, &n) in self.buckets.iter().enumerate() {
            seen += u64::from(n);
            if seen >= wanted {
                return last_of(i).min(self.max_ns);
            }
        }
        self.max_ns
    }
}

fn bucket_of(ns: u64) -> usize {
    if ns < PER_DOUBLING {
        return ns as usize;
    }
    let doubling = u64::from(ns.ilog2()) - 3;
    // The three bits below the leading one.
    let within = (ns >> doubling) - PER_DOUBLING;
    (((doubling + 1) * PER_DOUBLING + within) as usize).min(BUCKETS - 1)
}

/// The largest value that falls into the bucket.
fn last_of(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    if bucket < PER_DOUBLING {
        return bucket;
    }
    let doubling = bucket / PER_DOUBLING - 1;
    ((PER_DOUBLING + bucket % PER_DOUBLING + 1) << doubling) - 1
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_empty_histogram_says_zero() {
        let histogram = Histogram::new();
        assert_eq!(histogram.percentile_ns(500), 0);
        assert_eq!(histogram.max_ns(), 0);
    }

    #[test]
    fn percentiles_are_within_an_eighth() {
        let mut histogram = Histogram::new();
        (1..=1000u64).for_each(|us| histogram.add(us * 1000));
        for (per_mille, exact) in [(500, 500_000u64), (990, 990_000), (999, 999_000)] {
            let found = histogram.percentile_ns(per_mille);
            assert!((exact..=exact + exact / 8).contains(&found), "{found}");
        }
        assert_eq!(histogram.percentile_ns(1000), 1_000_000);
        assert_eq!(histogram.count(), 1000);
    }

    proptest! {
        #[test]
        fn a_value_lies_in_its_bucket(ns in 0..1u64 << 40) {
            let bucket = bucket_of(ns);
            prop_assert!(ns <= last_of(bucket));
            prop_assert!(bucket == 0 || ns > last_of(bucket - 1));
        }

        #[test]
        fn no_value_is_out_of_range(ns: u64) {
            prop_assert!(bucket_of(ns) < BUCKETS);
        }
    }
}
