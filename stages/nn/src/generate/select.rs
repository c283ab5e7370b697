//! The best few of a long row that arrives in parts.

use crate::cpu::ops;

/// Keeps the `count` largest values of a row and the tokens they belong to; of equal values the earlier tokens.
pub struct Best {
    count: usize,
    kept: Vec<(f32, u32)>,
    /// Nothing that is not larger can be among the best.
    threshold: f32,
}

impl Best {
    pub fn new(count: usize) -> Self {
        Self { count, kept: Vec::with_capacity(3 * count), threshold: f32::NEG_INFINITY }
    }

    /// Takes the next part of the row, which begins at token `first`.
    pub fn add(&mut self, first: usize, values: &[f32]) {
        for (index, part) in values.chunks(BLOCK).enumerate() {
            if ops::max(part) <= self.threshold {
                continue;
            }
            let start = (first + index * BLOCK) as u32;
            let larger = (start..).zip(part).filter(|(_, value)| **value > self.threshold);
            self.kept.extend(larger.map(|(token, value)| (*value, token)));
            if self.kept.len() >= 2 * self.count {
                self.shorten();
            }
        }
    }

    fn shorten(&mut self) {
        if self.kept.len() > self.count && self.count > 0 {
            self.kept.select_nth_unstable_by(self.count - 1, |a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
            self.kept.truncate(self.count);
            self.threshold = self.kept[self.count - 1].0;
        }
    }

    /// The best as `(value, token)`, in no order.
    pub fn finish(mut self) -> Vec<(f32, u32)> {
        self.shorten();
        self.kept
    }
}

/// Values that are looked at together before any of them is taken.
const BLOCK: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_are_those_of_a_sort() {
        let row: Vec<f32> = (0..3000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 22) as f32).collect();
        let mut sorted: Vec<(f32, u32)> = row.iter().copied().zip(0..).collect();
        sorted.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        for count in [1, 7, 40, 5000] {
            let mut best = Best::new(count);
            row.chunks(1024).enumerate().for_each(|(i, part)| best.add(i * 1024, part));
            let mut best = best.finish();
            best.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
            assert_eq!(best, sorted[..count.min(row.len())]);
        }
    }
}
