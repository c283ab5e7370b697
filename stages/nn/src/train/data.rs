//! What is trained on: tokenised samples of several sources, the order in which an epoch takes them, and the passes
//! of one optimiser step.

use rand::{Rng, SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;

use super::Batch;

/// A tokenised sample.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    pub tokens: Vec<u32>,
    /// The first token that the model learns to write; at least 1.
    pub learned_from: usize,
}

impl Sample {
    /// Number of tokens that are learned.
    pub fn targets(&self) -> usize {
        self.tokens.len().saturating_sub(self.learned_from.max(1))
    }
}

/// Samples of one file, and how many times an epoch takes each: 0.5 takes a random half, 2 takes all of them twice.
#[derive(Debug, Clone)]
pub struct Source {
    pub samples: Vec<Sample>,
    pub weight: f64,
}

/// All that is trained on.
#[derive(Debug, Clone, Default)]
pub struct Corpus {
    pub sources: Vec<Source>,
}

/// A sample's place: its source, and its number there.
pub type Place = (u32, u32);

impl Corpus {
    /// Samples that an epoch takes.
    pub fn epoch_len(&self) -> usize {
        self.sources.iter().map(Source::taken).sum()
    }

    pub fn get(&self, (source, sample): Place) -> &Sample {
        &self.sources[source as usize].samples[sample as usize]
    }

    pub fn samples(&self) -> impl Iterator<Item = &Sample> {
        self.sources.iter().flat_map(|s| &s.samples)
    }

    /// The order of an epoch: a function of the seed and the epoch's number.
    pub fn order(&self, seed: u64, epoch: u64) -> Vec<Place> {
        let mut random = ChaCha8Rng::seed_from_u64(seed ^ epoch.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let mut order = Vec::with_capacity(self.epoch_len());
        for (index, source) in self.sources.iter().enumerate() {
            let count = source.samples.len();
            let whole = source.taken() / count.max(1);
            for _ in 0..whole {
                order.extend((0..count as u32).map(|i| (index as u32, i)));
            }
            let rest = source.taken() - whole * count;
            if rest > 0 {
                let mut all: Vec<u32> = (0..count as u32).collect();
                let (some, _) = all.partial_shuffle(&mut random, rest);
                order.extend(some.iter().map(|&i| (index as u32, i)));
            }
        }
        order.shuffle(&mut random);
        order
    }

    /// Packs the samples at `places` into passes of at most `samples` samples and, but for a single longer sample,
    /// `tokens` tokens.
    pub fn passes(&self, places: &[Place], samples: usize, tokens: usize) -> Vec<Batch> {
        pack(places.iter().map(|&place| self.get(place)), samples, tokens)
    }
}

impl Source {
    fn taken(&self) -> usize {
        (self.samples.len() as f64 * self.weight).round() as usize
    }
}

/// Packs samples, in their order, as [`Corpus::passes`].
pub fn pack<'a>(samples: impl IntoIterator<Item = &'a Sample>, at_most: usize, tokens: usize) -> Vec<Batch> {
    let mut passes: Vec<Batch> = Vec::new();
    for sample in samples {
        let full = |b: &Batch| b.segments.len() >= at_most.max(1) || b.len() + sample.tokens.len() > tokens;
        if passes.last().is_none_or(full) {
            passes.push(Batch::default());
        }
        if let Some(batch) = passes.last_mut() {
            batch.push(&sample.tokens, sample.learned_from);
        }
    }
    passes
}

/// A seed for one pass: splitmix64 over the run's seed and the pass's number.
pub fn pass_seed(seed: u64, step: u64, pass: u64) -> u64 {
    let mix = seed ^ step.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ pass.wrapping_mul(0xd1b5_4a32_d192_ed03);
    ChaCha8Rng::seed_from_u64(mix).random()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(count: usize, weight: f64) -> Source {
        let sample = |i: usize| Sample { tokens: vec![1; 2 + i % 5], learned_from: 1 };
        Source { samples: (0..count).map(sample).collect(), weight }
    }

    #[test]
    fn weights_say_how_often_a_sample_is_taken() {
        let corpus = Corpus { sources: vec![source(10, 1.0), source(10, 2.5), source(7, 0.0)] };
        assert_eq!(corpus.epoch_len(), 35);
        let order = corpus.order(3, 0);
        assert_eq!(order.len(), 35);
        for i in 0..10 {
            assert_eq!(order.iter().filter(|&&p| p == (0, i)).count(), 1);
            assert!((2..=3).contains(&order.iter().filter(|&&p| p == (1, i)).count()));
        }
        assert_eq!(order, corpus.order(3, 0));
        assert_ne!(order, corpus.order(3, 1));
        assert_ne!(order, corpus.order(4, 0));
    }

    #[test]
    fn passes_hold_what_they_may() {
        let corpus = Corpus { sources: vec![source(10, 1.0)] };
        let places: Vec<Place> = (0..10).map(|i| (0, i)).collect();
        let passes = corpus.passes(&places, 4, 100);
        assert_eq!(passes.iter().map(|b| b.segments.len()).collect::<Vec<_>>(), [4, 4, 2]);
        let passes = corpus.passes(&places, 100, 9);
        assert!(passes.iter().all(|b| b.len() <= 9));
        assert_eq!(passes.iter().map(|b| b.segments.len()).sum::<usize>(), 10);
        assert_eq!(corpus.passes(&places, 100, 1).len(), 10, "a sample is never cut");
    }
}
