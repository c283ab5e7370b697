//! The best `k` of a stream of scores: what every exact top-k here ends in.

use std::cmp::Ordering;

/// Keeps the `k` best of what it is offered, in whatever order it comes; of equal scores the lowest index is the
/// better one. A score that is not a number is never kept.
pub struct Best {
    k: usize,
    kept: Vec<(u32, f32)>,
    /// A candidate must be better than this once `k` were kept.
    bar: (u32, f32),
}

fn better(a: &(u32, f32), b: &(u32, f32)) -> Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

impl Best {
    pub fn new(k: usize) -> Self {
        Self { k, kept: Vec::new(), bar: (0, f32::NEG_INFINITY) }
    }

    /// What is below this score is not kept any more.
    pub fn bar(&self) -> f32 {
        self.bar.1
    }

    #[inline]
    pub fn offer(&mut self, index: u32, score: f32) {
        if score > self.bar.1 || (score == self.bar.1 && index < self.bar.0) {
            self.keep(index, score);
        }
    }

    #[cold]
    fn keep(&mut self, index: u32, score: f32) {
        // Negative zero and zero are one score.
        self.kept.push((index, score + 0.0));
        if self.k == 0 {
            self.kept.clear();
        } else if self.kept.len() >= 2 * self.k {
            self.shorten();
        }
    }

    fn shorten(&mut self) {
        if self.k > 0 && self.kept.len() > self.k {
            self.kept.select_nth_unstable_by(self.k - 1, better);
            self.kept.truncate(self.k);
            self.bar = self.kept[self.k - 1];
        }
    }

    /// Indices with scores, in no order.
    pub fn into_unsorted(mut self) -> Vec<(u32, f32)> {
        self.shorten();
        self.kept
    }

    /// Indices with scores, best first.
    pub fn into_sorted(mut self) -> Vec<(u32, f32)> {
        self.kept.sort_unstable_by(better);
        self.kept.truncate(self.k);
        self.kept
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn equals_sorting_everything_in_any_order_of_offers(
            scores in prop::collection::vec(-3i8..4, 0..80),
            turn in 0usize..80,
            backwards: bool,
            k in 0usize..20,
        ) {
            let mut all: Vec<(u32, f32)> = (0..).zip(scores.iter().map(|s| f32::from(*s))).collect();
            let mut offers = all.clone();
            offers.rotate_left(turn % all.len().max(1));
            if backwards {
                offers.reverse();
            }
            let mut best = Best::new(k);
            offers.iter().for_each(|(index, score)| best.offer(*index, *score));
            all.sort_by(|a, b| b.1.partial_cmp(&a.1).unwrap());
            all.truncate(k);
            prop_assert_eq!(best.into_sorted(), all);
        }
    }

    #[test]
    fn not_a_number_is_never_kept() {
        let mut best = Best::new(2);
        [f32::NAN, 1.0, f32::NAN].into_iter().zip(0..).for_each(|(score, index)| best.offer(index, score));
        assert_eq!(best.into_sorted(), [(1, 1.0)]);
    }
}
