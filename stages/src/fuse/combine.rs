//! Several lists of one user become one: each model's contribution to each candidate, and their weighted sum.
//!
//! An item that a model does not list gets nothing from it. Equal sums stand in the order in which the candidates were
//! met: by the first model's list, then the second's, which knows nothing of the target.

use std::{cmp::Ordering, fmt};

use rustc_hash::FxHashMap;

use super::lists::List;

/// How a place in a list, or its score, becomes a contribution.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// 1 / (constant + rank): Cormack, Clarke and Büttcher, "Reciprocal rank fusion", SIGIR 2009.
    ReciprocalRank(u32),
    /// (score − worst) / (best − worst).
    MinMax,
    /// exp(score) / Σ exp(scores of the list).
    Softmax,
}

impl Rule {
    /// As the parameter `methods` spells it.
    pub fn method(self) -> &'static str {
        match self {
            Self::ReciprocalRank(_) => "reciprocal_rank",
            Self::MinMax => "min_max",
            Self::Softmax => "softmax",
        }
    }

    /// What each place of a list contributes. All are positive for what is listed, or 0.
    fn contributions(self, scores: &[f32]) -> Vec<f64> {
        let best = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        match self {
            Self::ReciprocalRank(constant) => {
                (1..=scores.len()).map(|rank| 1.0 / (f64::from(constant) + rank as f64)).collect()
            }
            Self::MinMax => {
                let worst = scores.iter().copied().fold(f32::INFINITY, f32::min);
                let range = f64::from(best) - f64::from(worst);
                let place =
                    |score: &f32| if range > 0.0 { (f64::from(*score) - f64::from(worst)) / range } else { 1.0 };
                scores.iter().map(place).collect()
            }
            Self::Softmax => {
                let powers: Vec<f64> = scores.iter().map(|s| (f64::from(*s) - f64::from(best)).exp()).collect();
                let sum: f64 = powers.iter().sum();
                powers.into_iter().map(|p| p / sum).collect()
            }
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ReciprocalRank(constant) => write!(f, "reciprocal_rank with constant {constant}"),
            other => f.write_str(other.method()),
        }
    }
}

/// The distinct items of a user's lists, and what each model contributes to each.
#[derive(Debug)]
pub struct Candidates {
    pub items: Vec<u32>,
    /// `[items, models]`.
    contributions: Vec<f64>,
    models: usize,
}

impl Candidates {
    pub fn new(lists: &[List], rule: Rule, depth: usize) -> Self {
        let models = lists.len();
        let mut places: FxHashMap<u32, usize> = FxHashMap::default();
        let (mut items, mut contributions) = (Vec::new(), Vec::new());
        for (model, list) in lists.iter().enumerate() {
            let depth = depth.min(list.items.len());
            for (&item, contribution) in list.items.iter().zip(rule.contributions(&list.scores[..depth])) {
                let place = *places.entry(item).or_insert_with(|| {
                    items.push(item);
                    contributions.resize(items.len() * models, 0.0);
                    items.len() - 1
                });
                contributions[place * models + model] = contribution;
            }
        }
        Self { items, contributions, models }
    }

    pub fn score(&self, place: usize, weights: &[f64]) -> f64 {
        self.contributions[place * self.models..][..self.models].iter().zip(weights).map(|(c, w)| c * w).sum()
    }

    /// The rank, from 1, of the candidate at `place`.
    pub fn rank(&self, place: usize, weights: &[f64]) -> u32 {
        let own = self.score(place, weights);
        let before = |other: &usize| {
            let score = self.score(*other, weights);
            score > own || (score == own && *other < place)
        };
        (0..self.items.len()).filter(before).count() as u32 + 1
    }
}

/// The fused list of one user, best first, with its scores.
pub fn fuse(lists: &[List], rule: Rule, depth: usize, weights: &[f64]) -> Vec<(u32, f64)> {
    let candidates = Candidates::new(lists, rule, depth);
    let scores: Vec<f64> = (0..candidates.items.len()).map(|place| candidates.score(place, weights)).collect();
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].partial_cmp(&scores[a]).unwrap_or(Ordering::Equal));
    order.into_iter().map(|place| (candidates.items[place], scores[place])).collect()
}
