//! Recall, NDCG and where hits stand, from the rank of each user's one target; and how sure the figures are.
//!
//! With one relevant item a user, Recall@K is the share of users whose target is among the first K, and NDCG@K the
//! mean of 1/log2(rank + 1) over those, 0 for the others (the ideal gain is 1). Reading rankings and finding ranks is
//! left to the stage.

use std::collections::BTreeMap;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use serde_json::{Map, Value, json};

/// The target's place in a list, from 1; `None` if it is not in it.
pub type Rank = Option<u32>;

/// Recall and NDCG at each of `cutoffs`, as `recall@5`, `ndcg@5`, …, and the number of users.
pub fn at_cutoffs(ranks: &[Rank], cutoffs: &[u32]) -> Map<String, Value> {
    let counts = Counts::of(ranks.iter().copied(), cutoffs);
    let mut metrics = Map::new();
    for &k in cutoffs {
        metrics.insert(format!("recall@{k}"), json!(counts.recall(k)));
    }
    for &k in cutoffs {
        metrics.insert(format!("ndcg@{k}"), json!(counts.ndcg(k)));
    }
    metrics.insert("users".into(), json!(ranks.len()));
    metrics
}

/// How many targets stand at rank 1, 2, … up to the largest cut-off.
pub fn hit_positions(ranks: &[Rank], cutoffs: &[u32]) -> Map<String, Value> {
    let counts = Counts::of(ranks.iter().copied(), cutoffs);
    (1..).zip(&counts.at).map(|(rank, count): (u32, _)| (rank.to_string(), json!(count))).collect()
}

/// [`at_cutoffs`] for each label's users; users without a label are left out.
pub fn by_label<'a>(
    ranks: &[Rank],
    labels: impl Iterator<Item = Option<&'a str>>,
    cutoffs: &[u32],
) -> Map<String, Value> {
    let mut groups: BTreeMap<&str, Vec<Rank>> = BTreeMap::new();
    for (&rank, label) in ranks.iter().zip(labels) {
        if let Some(label) = label {
            groups.entry(label).or_default().push(rank);
        }
    }
    groups.into_iter().map(|(label, ranks)| (label.to_owned(), Value::Object(at_cutoffs(&ranks, cutoffs)))).collect()
}

/// The 95 % interval of every figure of [`at_cutoffs`], `[low, high]`: percentiles of `resamples` bootstrap samples
/// of users (Efron's percentile method). Each sample has a random stream of its own, so the result does not depend
/// on the number of threads.
pub fn intervals(ranks: &[Rank], cutoffs: &[u32], resamples: u32, seed: u64) -> Map<String, Value> {
    if ranks.is_empty() || resamples == 0 {
        return Map::new();
    }
    let samples: Vec<Counts> = (0..u64::from(resamples))
        .into_par_iter()
        .map(|stream| {
            let mut random = ChaCha8Rng::seed_from_u64(seed);
            random.set_stream(stream);
            Counts::of((0..ranks.len()).map(|_| ranks[random.random_range(0..ranks.len())]), cutoffs)
        })
        .collect();
    let interval = |figure: &dyn Fn(&Counts) -> f64| {
        let mut values: Vec<f64> = samples.iter().map(figure).collect();
        values.sort_unstable_by(f64::total_cmp);
        json!([percentile(&values, 0.025), percentile(&values, 0.975)])
    };
    let mut result = Map::new();
    for &k in cutoffs {
        result.insert(format!("recall@{k}"), interval(&|c| c.recall(k)));
    }
    for &k in cutoffs {
        result.insert(format!("ndcg@{k}"), interval(&|c| c.ndcg(k)));
    }
    result
}

/// Linear interpolation between closest ranks of `sorted`, which is not empty.
fn percentile(sorted: &[f64], p: f64) -> f64 {
    let place = p * (sorted.len() - 1) as f64;
    let (low, high) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
    low + (high - low) * place.fract()
}

/// All that the figures need to know of a set of users.
struct Counts {
    users: usize,
    /// `at[r - 1]`: targets at rank `r`, up to the largest cut-off.
    at: Vec<u32>,
}

impl Counts {
    fn of(ranks: impl Iterator<Item = Rank>, cutoffs: &[u32]) -> Self {
        let deepest = cutoffs.iter().copied().max().unwrap_or(0) as usize;
        let (mut users, mut at) = (0, vec![0; deepest]);
        for rank in ranks {
            users += 1;
            if let Some(slot) = rank.and_then(|r| r.checked_sub(1)).and_then(|r| at.get_mut(r as usize)) {
                *slot += 1;
            }
        }
        Self { users, at }
    }

    fn mean(&self, k: u32, gain: impl Fn(u32) -> f64) -> f64 {
        if self.users == 0 {
            return 0.0;
        }
        let sum: f64 = (1..=k).zip(&self.at).map(|(rank, &count)| f64::from(count) * gain(rank)).sum();
        sum / self.users as f64
    }

    fn recall(&self, k: u32) -> f64 {
        self.mean(k, |_| 1.0)
    }

    fn ndcg(&self, k: u32) -> f64 {
        self.mean(k, |rank| 1.0 / f64::from(rank + 1).log2())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn number(metrics: &Map<String, Value>, name: &str) -> f64 {
        metrics[name].as_f64().unwrap()
    }

    #[test]
    fn by_hand() {
        let ranks = [Some(1), Some(3), None, Some(11)];
        let m = at_cutoffs(&ranks, &[1, 5, 20]);
        assert_eq!(number(&m, "recall@1"), 0.25);
        assert_eq!(number(&m, "recall@5"), 0.5);
        assert_eq!(number(&m, "recall@20"), 0.75);
        assert_eq!(number(&m, "ndcg@1"), 0.25);
        assert_eq!(number(&m, "ndcg@5"), (1.0 + 0.5) / 4.0);
        assert_eq!(m["users"], 4);
        let hits = hit_positions(&ranks, &[1, 3]);
        assert_eq!(Value::Object(hits), json!({"1": 1, "2": 0, "3": 1}));
        let groups = by_label(&ranks, [Some("a"), None, Some("b"), Some("a")].into_iter(), &[20]);
        assert_eq!(groups["a"]["recall@20"], 1.0);
        assert_eq!(groups["b"]["users"], 1);
    }

    #[test]
    fn no_users_give_zeros_and_no_interval() {
        assert_eq!(number(&at_cutoffs(&[], &[5]), "recall@5"), 0.0);
        assert!(intervals(&[], &[5], 100, 1).is_empty());
    }

    #[test]
    fn the_interval_of_a_share_is_near_the_normal_one() {
        let ranks: Vec<Rank> = (0..2000).map(|i| (i % 10 == 0).then_some(1)).collect();
        let intervals = intervals(&ranks, &[1], 1000, 3);
        let half = 1.96 * (0.1f64 * 0.9 / 2000.0).sqrt();
        let (low, high) = (intervals["recall@1"][0].as_f64().unwrap(), intervals["recall@1"][1].as_f64().unwrap());
        assert!((low - (0.1 - half)).abs() < 0.003, "{low}");
        assert!((high - (0.1 + half)).abs() < 0.003, "{high}");
    }

    #[test]
    fn the_interval_does_not_depend_on_threads() {
        let ranks: Vec<Rank> = (0..100).map(|i| (i % 3 == 0).then_some(i)).collect();
        let on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| intervals(&ranks, &[5, 20], 50, 9))
        };
        assert_eq!(on(1), on(3));
    }

    proptest! {
        #[test]
        fn equal_the_definitions(ranks in prop::collection::vec(prop::option::of(1u32..40), 1..60), k in 1u32..30) {
            let m = at_cutoffs(&ranks, &[k]);
            let n = ranks.len() as f64;
            let hits = ranks.iter().flatten().filter(|r| **r <= k);
            let recall = hits.clone().count() as f64 / n;
            let ndcg = hits.map(|r| 2f64.ln() / (f64::from(*r) + 1.0).ln()).sum::<f64>() / n;
            let (got_recall, got_ndcg) = (number(&m, &format!("recall@{k}")), number(&m, &format!("ndcg@{k}")));
            prop_assert!((got_recall - recall).abs() < 1e-12);
            prop_assert!((got_ndcg - ndcg).abs() < 1e-12);
        }
    }
}
