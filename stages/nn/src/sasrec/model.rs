//! A model: its shape, its parameters, and the hidden state that it has for a history.

use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
use rayon::prelude::*;

use super::{
    SasrecError,
    config::Architecture,
    network::{Activations, Layout, Network, Piece, fill_normal},
    scoring,
};

/// A SASRec model. Items are numbers from 0; what they are called is the caller's business.
#[derive(Debug, Clone)]
pub struct Model {
    pub(super) architecture: Architecture,
    pub(super) layout: Layout,
    /// Parameters of the network, by `layout`.
    pub(super) parameters: Vec<f32>,
    /// Item embeddings, `[items, hidden]`.
    pub(super) items: Vec<f32>,
}

impl Model {
    /// # Errors
    /// `architecture` breaks a limit.
    pub fn new(architecture: Architecture, seed: u64) -> Result<Self, SasrecError> {
        architecture.check()?;
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let layout = Layout::new(&architecture);
        let parameters = layout.initialise(&mut rng);
        let mut items = vec![0.0; architecture.items * architecture.hidden];
        fill_normal(&mut items, 0.02, &mut rng);
        Ok(Self { architecture, layout, parameters, items })
    }

    pub fn architecture(&self) -> &Architecture {
        &self.architecture
    }

    /// Number of parameters, item embeddings included.
    pub fn parameter_count(&self) -> usize {
        self.parameters.len() + self.items.len()
    }

    pub(super) fn network(&self) -> Network<'_> {
        Network {
            layout: &self.layout,
            parameters: &self.parameters,
            items: &self.items,
            hidden: self.architecture.hidden,
            heads: self.architecture.heads,
            activation: self.architecture.activation,
        }
    }

    /// The part of a history that the model looks at.
    pub(super) fn window<'h>(&self, history: &'h [u32]) -> &'h [u32] {
        &history[history.len().saturating_sub(self.architecture.max_length)..]
    }

    /// Query vectors, `[histories, hidden]`: what is multiplied with item vectors. A history without items gets zeros,
    /// and so equal scores for all items.
    pub(super) fn queries(&self, histories: &[&[u32]]) -> Vec<f32> {
        const HISTORIES: usize = 64;
        let width = self.architecture.hidden;
        let mut queries = vec![0.0; histories.len() * width];
        queries.par_chunks_mut(HISTORIES * width).zip(histories.par_chunks(HISTORIES)).for_each(
            |(queries, histories)| {
                let mut piece = Piece::default();
                histories.iter().for_each(|history| piece.push(self.window(history)));
                let mut activations = Activations::default();
                self.network().forward(&piece, &mut activations, None);
                let vectors = scoring::query_vectors(self.architecture.scoring, &activations.hidden, width).vectors;
                for (query, sequence) in queries.chunks_exact_mut(width).zip(&piece.sequences) {
                    if !sequence.is_empty() {
                        query.copy_from_slice(&vectors[(sequence.end - 1) * width..sequence.end * width]);
                    }
                }
            },
        );
        queries
    }
}
