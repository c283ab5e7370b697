//! What a pass computes: samples laid end to end, and what is dropped on the way.

use super::kernels::Dropout;

/// Samples laid end to end. Attention never crosses from one to the next, and positions restart at each.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Batch {
    pub tokens: Vec<u32>,
    pub positions: Vec<u32>,
    /// Lengths of the samples.
    pub segments: Vec<usize>,
    /// Places whose next token is learned, and that token.
    pub targets: Vec<(usize, u32)>,
}

impl Batch {
    /// Adds a sample; the tokens from `learned_from` on are what the model learns to write.
    pub fn push(&mut self, tokens: &[u32], learned_from: usize) {
        let base = self.tokens.len();
        self.tokens.extend_from_slice(tokens);
        self.positions.extend(0..tokens.len() as u32);
        self.segments.push(tokens.len());
        self.targets.extend((learned_from.max(1)..tokens.len()).map(|i| (base + i - 1, tokens[i])));
    }

    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }
}

/// How much to drop while training, and the seed of which.
#[derive(Debug, Clone, Copy, Default)]
pub struct DropoutRates {
    /// Of embeddings and of every residual branch.
    pub residual: f32,
    pub seed: u64,
}

/// Dropout while a batch is computed: none outside training.
#[derive(Clone, Copy)]
pub struct Mode {
    pub rates: Option<DropoutRates>,
}

impl Mode {
    /// Where dropout is applied: 0 is the embedding, then two branches a layer.
    pub fn site(self, site: usize) -> Option<Dropout> {
        self.rates.and_then(|rates| Dropout::new(rates.residual, rates.seed, site as u64))
    }

    pub fn seed(self) -> Option<u64> {
        self.rates.map(|rates| rates.seed)
    }
}
