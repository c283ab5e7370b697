//! Is one model better than another? Paired differences over users, with bootstrap intervals and p-values, and Holm's
//! correction where many questions are asked at once.
//!
//! Pairing is what makes small differences visible: most users are hits or misses of both models, and tell nothing.
//! The ranks themselves are `evaluate`'s (`per_user`).

use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use rustc_hash::FxHashMap;

/// A figure with one relevant item a user.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Figure {
    /// The share of users whose target is among the first K.
    Recall(u32),
    /// The mean of 1 / log2(rank + 1) over those, 0 for the others.
    Ndcg(u32),
}

impl Figure {
    /// Reads `recall@5` or `ndcg@10`.
    pub fn parse(name: &str) -> Option<Self> {
        let (figure, k) = name.split_once('@')?;
        let k = k.parse().ok().filter(|k| *k > 0)?;
        match figure {
            "recall" => Some(Self::Recall(k)),
            "ndcg" => Some(Self::Ndcg(k)),
            _ => None,
        }
    }

    /// What a user adds whose target stands at `rank`.
    pub fn gain(self, rank: Option<u32>) -> f64 {
        match (self, rank) {
            (Self::Recall(k), Some(rank)) if rank <= k => 1.0,
            (Self::Ndcg(k), Some(rank)) if rank <= k => 1.0 / f64::from(rank + 1).log2(),
            _ => 0.0,
        }
    }
}

/// How much higher one model's figure is than another's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Difference {
    pub mean: f64,
    /// The 95 % interval: percentiles of the bootstrap distribution (Efron).
    pub low: f64,
    pub high: f64,
    /// Two-sided: how often a bootstrap sample is at least as far from the mean as the mean is from 0 (Efron and
    /// Tibshirani, "An Introduction to the Bootstrap", chapter 16).
    pub p: f64,
}

/// The difference (`second` − `first`) of each figure over the same users, from `resamples` bootstrap samples of users.
/// Samples have random streams of their own: threads change nothing, and equal seeds draw equal users for every pair.
///
/// # Panics
/// If the two do not have one rank a user each.
pub fn differences(
    first: &[Option<u32>],
    second: &[Option<u32>],
    figures: &[Figure],
    resamples: u32,
    seed: u64,
) -> Vec<Difference> {
    assert_eq!(first.len(), second.len(), "one rank a user from each model");
    let users = first.len();
    if users == 0 || resamples == 0 {
        return figures.iter().map(|_| Difference { mean: 0.0, low: 0.0, high: 0.0, p: 1.0 }).collect();
    }
    // Users with equal pairs of gains are interchangeable: a sample is how often each kind of user was drawn.
    let mut kinds: Vec<Vec<f64>> = Vec::new();
    let mut known: FxHashMap<Vec<u64>, u32> = FxHashMap::default();
    let of_user: Vec<u32> = first
        .iter()
        .zip(second)
        .map(|(a, b)| {
            let gains: Vec<f64> = figures.iter().map(|f| f.gain(*b) - f.gain(*a)).collect();
            *known.entry(gains.iter().map(|g| g.to_bits()).collect()).or_insert_with(|| {
                kinds.push(gains);
                kinds.len() as u32 - 1
            })
        })
        .collect();
    let mean_of = |counts: &[u32], figure: usize| {
        counts.iter().zip(&kinds).map(|(&count, gains)| f64::from(count) * gains[figure]).sum::<f64>() / users as f64
    };
    let mut whole = vec![0u32; kinds.len()];
    of_user.iter().for_each(|kind| whole[*kind as usize] += 1);
    let samples: Vec<Vec<f64>> = (0..u64::from(resamples))
        .into_par_iter()
        .map(|stream| {
            let mut random = ChaCha8Rng::seed_from_u64(seed);
            random.set_stream(stream);
            let mut counts = vec![0u32; kinds.len()];
            for _ in 0..users {
                // Lemire's multiplication; the bias of at most users / 2³² is far below what is asked for.
                let user = (u64::from(random.next_u32()) * users as u64) >> 32;
                counts[of_user[user as usize] as usize] += 1;
            }
            (0..figures.len()).map(|figure| mean_of(&counts, figure)).collect()
        })
        .collect();
    let difference = |figure: usize| {
        let mean = mean_of(&whole, figure);
        let mut values: Vec<f64> = samples.iter().map(|s| s[figure]).collect();
        values.sort_unstable_by(f64::total_cmp);
        // The tolerance keeps samples that differ by rounding alone on the side of "as far".
        let far = values.iter().filter(|v| (**v - mean).abs() >= mean.abs() - 1e-12).count();
        let p = (far + 1) as f64 / (values.len() + 1) as f64;
        Difference { mean, low: percentile(&values, 0.025), high: percentile(&values, 0.975), p }
    };
    (0..figures.len()).map(difference).collect()
}

/// Linear interpolation between closest ranks of `sorted`, which is not empty.
fn percentile(sorted: &[f64], p: f64) -> f64 {
    let place = p * (sorted.len() - 1) as f64;
    let (low, high) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
    low + (high - low) * place.fract()
}

/// Holm's step-down adjustment (1979): p-values that may be held against one level however many there are.
pub fn holm(p: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..p.len()).collect();
    order.sort_by(|&a, &b| p[a].total_cmp(&p[b]));
    let mut adjusted = vec![0.0; p.len()];
    let mut highest = 0.0f64;
    for (done, &place) in order.iter().enumerate() {
        highest = highest.max((p[place] * (p.len() - done) as f64).min(1.0));
        adjusted[place] = highest;
    }
    adjusted
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIGURES: [Figure; 2] = [Figure::Recall(2), Figure::Ndcg(2)];

    #[test]
    fn equal_models_differ_by_nothing_and_surely_so() {
        let ranks: Vec<Option<u32>> = (0..50).map(|u| (u % 3 > 0).then_some(u % 3)).collect();
        for d in differences(&ranks, &ranks, &FIGURES, 200, 1) {
            assert_eq!(d, Difference { mean: 0.0, low: 0.0, high: 0.0, p: 1.0 });
        }
    }

    #[test]
    fn intervals_agree_with_the_normal_approximation() {
        // 1000 users: 60 hits of the second model alone, 30 of the first alone. The mean of the differences is 0.03,
        // its standard error √((0.09 − 0.03²) / 1000) = 0.00944.
        let first: Vec<Option<u32>> = (0..1000).map(|u| (u < 30).then_some(1)).collect();
        let second: Vec<Option<u32>> = (0..1000).map(|u| (100..160).contains(&u).then_some(1)).collect();
        let d = differences(&first, &second, &FIGURES, 4000, 7)[0];
        assert!((d.mean - 0.03).abs() < 1e-12);
        assert!((d.low - (0.03 - 1.96 * 0.00944)).abs() < 0.0015, "{d:?}");
        assert!((d.high - (0.03 + 1.96 * 0.00944)).abs() < 0.0015, "{d:?}");
        // z = 3.18, two-sided 0.0015.
        assert!(d.p > 0.0002 && d.p < 0.004, "{d:?}");
        let back = differences(&second, &first, &FIGURES, 4000, 7)[0];
        assert_eq!((back.mean, back.p), (-d.mean, d.p));
    }

    #[test]
    fn pairing_shows_what_separate_intervals_hide() {
        // The second model hits all of the first one's 500 targets and 12 more: surely better, though each figure's
        // own interval is six times as wide as the difference.
        let first: Vec<Option<u32>> = (0..1000).map(|u| (u < 500).then_some(2)).collect();
        let second: Vec<Option<u32>> = (0..1000).map(|u| (u < 512).then_some(2)).collect();
        let d = differences(&first, &second, &FIGURES, 2000, 3);
        assert!(d[0].low > 0.0 && d[0].p < 0.01, "{d:?}");
        assert!((d[1].mean - 0.012 / 3f64.log2()).abs() < 1e-12);
    }

    #[test]
    fn seeds_fix_the_result_whatever_the_threads() {
        let first: Vec<Option<u32>> = (0..300).map(|u| (u % 7 == 0).then_some(1 + u % 2)).collect();
        let second: Vec<Option<u32>> = (0..300).map(|u| (u % 5 == 0).then_some(1)).collect();
        let on = |threads: usize, seed: u64| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| differences(&first, &second, &FIGURES, 300, seed))
        };
        assert_eq!(on(1, 5), on(3, 5));
        assert_ne!(on(1, 5), on(1, 6));
    }

    #[test]
    fn holm_as_in_the_textbook() {
        let adjusted = holm(&[0.01, 0.04, 0.03, 0.005]);
        let wanted = [0.03, 0.06, 0.06, 0.02];
        assert!(adjusted.iter().zip(wanted).all(|(a, w)| (a - w).abs() < 1e-12), "{adjusted:?}");
        assert_eq!(holm(&[0.6, 0.9]), [1.0, 1.0]);
        assert!(holm(&[]).is_empty());
    }

    #[test]
    fn figures_by_name() {
        assert_eq!(Figure::parse("recall@5"), Some(Figure::Recall(5)));
        assert_eq!(Figure::parse("ndcg@10"), Some(Figure::Ndcg(10)));
        assert!(["users", "recall@", "recall@0", "mrr@5"].iter().all(|n| Figure::parse(n).is_none()));
    }
}
