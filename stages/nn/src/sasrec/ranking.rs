//! Full ranking: where a target stands among all items, recall and NDCG from that, each history's best items, and
//! each item's most similar ones.
//!
//! Ties are counted honestly. In metrics a target that shares its score with others gets the mean over all orders of
//! the tied items. In lists equal scores are ordered by item number, which knows nothing of the target.

use std::cmp::Ordering;

use rayon::prelude::*;

use super::{
    matmul::{Into, Matrix, matmul},
    model::Model,
    scoring,
};

/// Histories scored at a time; a row of scores has one place an item.
const ROWS: usize = 32;

/// A history and the item that came next.
#[derive(Debug, Clone)]
pub struct Query {
    /// Oldest first.
    pub history: Vec<u32>,
    pub target: u32,
}

/// How many items score higher than the target, and how many others the same. `None` stands for a target that is
/// left out because it was seen.
pub type Placement = Option<Place>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    pub higher: usize,
    pub tied: usize,
}

/// An item and its score.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scored {
    pub item: u32,
    pub score: f32,
}

/// Means over queries, at one cut-off.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Metrics {
    pub recall: f64,
    pub ndcg: f64,
}

impl Metrics {
    /// One relevant item a query: recall@k is the share of targets in the first `k`, NDCG@k the mean of
    /// 1 / log₂(rank + 1) where the rank is at most `k`.
    pub fn at(k: usize, placements: &[Placement]) -> Self {
        let mut total = Self::default();
        for place in placements.iter().flatten() {
            let orders = (place.tied + 1) as f64;
            let ranks = place.higher + 1..=(place.higher + place.tied + 1).min(k);
            total.recall += ranks.clone().count() as f64 / orders;
            total.ndcg += ranks.map(|rank| 1.0 / ((rank + 1) as f64).log2()).sum::<f64>() / orders;
        }
        let queries = placements.len().max(1) as f64;
        Self { recall: total.recall / queries, ndcg: total.ndcg / queries }
    }
}

impl Model {
    /// Where each query's target stands among all items, those of the history left out if `exclude_seen`.
    pub fn place(&self, queries: &[Query], exclude_seen: bool) -> Vec<Placement> {
        let histories: Vec<&[u32]> = queries.iter().map(|q| q.history.as_slice()).collect();
        self.for_scores(&histories, |row, scores| {
            let query = &queries[row];
            if exclude_seen {
                exclude(scores, &query.history);
            }
            let target = scores[query.target as usize];
            if target == f32::NEG_INFINITY {
                return None;
            }
            let higher = scores.iter().filter(|s| **s > target).count();
            let equal = scores.iter().filter(|s| **s == target).count();
            Some(Place { higher, tied: equal.saturating_sub(1) })
        })
    }

    /// The best `count` items after each history, best first.
    pub fn recommend(&self, histories: &[&[u32]], count: usize, exclude_seen: bool) -> Vec<Vec<Scored>> {
        self.for_scores(histories, |row, scores| {
            if exclude_seen {
                exclude(scores, histories[row]);
            }
            best(scores, count)
        })
    }

    /// The `count` nearest others of each of `items` among `items` (ascending), by cosine of embeddings, best first.
    pub fn similar(&self, items: &[u32], count: usize) -> Vec<Vec<Scored>> {
        let width = self.architecture.hidden;
        let chosen: Vec<f32> =
            items.iter().flat_map(|&item| &self.items[item as usize * width..][..width]).copied().collect();
        let vectors = scoring::normalised(&chosen, width, 1.0).vectors;
        score_rows(&vectors, &vectors, width, |row, scores| {
            exclude(scores, &[row as u32]);
            let places = best(scores, count);
            places.into_iter().map(|s| Scored { item: items[s.item as usize], ..s }).collect()
        })
    }

    fn for_scores<T: Send>(&self, histories: &[&[u32]], visit: impl Fn(usize, &mut [f32]) -> T + Sync) -> Vec<T> {
        let width = self.architecture.hidden;
        let items = scoring::item_vectors(self.architecture.scoring, &self.items, width).vectors;
        score_rows(&self.queries(histories), &items, width, visit)
    }
}

/// Calls `visit` with each query's number and its scores for all items.
fn score_rows<T: Send>(
    queries: &[f32],
    items: &[f32],
    width: usize,
    visit: impl Fn(usize, &mut [f32]) -> T + Sync,
) -> Vec<T> {
    let count = items.len() / width;
    let items = Matrix::new(items, count, width);
    let blocks: Vec<Vec<T>> = queries
        .par_chunks(ROWS * width)
        .enumerate()
        .map_init(Vec::new, |scores: &mut Vec<f32>, (block, queries)| {
            let rows = queries.len() / width;
            scores.resize(rows * count, 0.0);
            matmul(scores, Into::Replace, Matrix::new(queries, rows, width), items.transposed());
            scores.chunks_exact_mut(count).enumerate().map(|(row, scores)| visit(block * ROWS + row, scores)).collect()
        })
        .collect();
    blocks.into_iter().flatten().collect()
}

fn exclude(scores: &mut [f32], items: &[u32]) {
    for &item in items {
        if let Some(score) = scores.get_mut(item as usize) {
            *score = f32::NEG_INFINITY;
        }
    }
}

/// The best `count` items that are not left out; equal scores in the order of item numbers.
fn best(scores: &[f32], count: usize) -> Vec<Scored> {
    let order = |a: &Scored, b: &Scored| -> Ordering { b.score.total_cmp(&a.score).then(a.item.cmp(&b.item)) };
    let mut candidates: Vec<Scored> = (0..)
        .zip(scores)
        .filter(|(_, score)| **score > f32::NEG_INFINITY)
        .map(|(item, &score)| Scored { item, score })
        .collect();
    if count == 0 {
        return Vec::new();
    }
    if candidates.len() > count {
        candidates.select_nth_unstable_by(count - 1, order);
        candidates.truncate(count);
    }
    candidates.sort_unstable_by(order);
    // Lists are kept by the thousand, and each was as long as the catalogue.
    candidates.shrink_to_fit();
    candidates
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tied_target_gets_the_mean_over_all_orders() {
        let alone = Some(Place { higher: 2, tied: 0 });
        assert_eq!(Metrics::at(2, &[alone]), Metrics::default());
        assert_eq!(Metrics::at(3, &[alone]), Metrics { recall: 1.0, ndcg: 0.5 });
        // Three tied items on ranks 1 to 3: the target is first, second or third, equally often.
        let tied = Some(Place { higher: 0, tied: 2 });
        let metrics = Metrics::at(2, &[tied]);
        assert!((metrics.recall - 2.0 / 3.0).abs() < 1e-12);
        assert!((metrics.ndcg - (1.0 + 1.0 / 3f64.log2()) / 3.0).abs() < 1e-12);
        assert_eq!(Metrics::at(10, &[None, alone]).recall, 0.5, "a target that was left out is a miss");
    }

    #[test]
    fn best_items_come_in_order_and_ties_by_number() {
        let scores = [1.0, 3.0, f32::NEG_INFINITY, 3.0, -2.0];
        let items = |n: usize| best(&scores, n).iter().map(|s| s.item).collect::<Vec<_>>();
        assert_eq!(items(2), [1, 3]);
        assert_eq!(items(9), [1, 3, 0, 4]);
        assert!(items(0).is_empty());
    }
}
