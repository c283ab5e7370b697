//! From hidden states and item embeddings to vectors whose dot product is the score, and the gradients back.
//!
//! For `Scoring::Dot` nothing changes. For `Scoring::Cosine` rows are brought to length 1, and hidden states are
//! divided by the temperature besides.

use std::borrow::Cow;

use rayon::prelude::*;

use super::{
    config::Scoring,
    kernels::{add_scaled, dot, vectorised},
};

/// Rows that one thread normalises at a time.
const ROWS: usize = 1024;
/// Keeps a row of zeros from dividing by zero.
const TINY: f32 = 1e-12;

/// Rows brought to one length, with what the way back needs.
#[derive(Debug)]
pub struct Rows<'a> {
    pub vectors: Cow<'a, [f32]>,
    factors: Vec<f32>,
    length: f32,
}

/// Item vectors for scoring.
pub fn item_vectors(scoring: Scoring, embeddings: &[f32], width: usize) -> Rows<'_> {
    match scoring {
        Scoring::Dot => Rows { vectors: Cow::Borrowed(embeddings), factors: Vec::new(), length: 1.0 },
        Scoring::Cosine { .. } => normalised(embeddings, width, 1.0),
    }
}

/// Query vectors for scoring.
pub fn query_vectors(scoring: Scoring, hidden: &[f32], width: usize) -> Rows<'_> {
    match scoring {
        Scoring::Dot => Rows { vectors: Cow::Borrowed(hidden), factors: Vec::new(), length: 1.0 },
        Scoring::Cosine { temperature } => normalised(hidden, width, 1.0 / temperature),
    }
}

/// Every row brought to `length`; also what cosine similarity of embeddings is computed from.
pub fn normalised(x: &[f32], width: usize, length: f32) -> Rows<'static> {
    let mut vectors = x.to_vec();
    let mut factors = vec![0.0; x.len() / width];
    vectors
        .par_chunks_mut(ROWS * width)
        .zip(factors.par_chunks_mut(ROWS))
        .for_each(|(vectors, factors)| normalise(vectors, factors, length));
    Rows { vectors: Cow::Owned(vectors), factors, length }
}

vectorised! {
    fn normalise(vectors: &mut [f32], factors: &mut [f32], length: f32) {
        let width = vectors.len() / factors.len();
        for (row, factor) in vectors.chunks_exact_mut(width).zip(factors) {
            *factor = length / (dot(row, row) + TINY).sqrt();
            for x in row.iter_mut() {
                *x *= *factor;
            }
        }
    }
}

vectorised! {
    fn normalise_backward(grad: &mut [f32], vectors: &[f32], factors: &[f32], length: f32) {
        let width = vectors.len() / factors.len();
        for ((grad, row), factor) in grad.chunks_exact_mut(width).zip(vectors.chunks_exact(width)).zip(factors) {
            let along = dot(grad, row) / (length * length);
            add_scaled(grad, -along, row);
            for g in grad.iter_mut() {
                *g *= factor;
            }
        }
    }
}

impl Rows<'_> {
    /// Turns the gradient of the vectors into that of the rows they were made from, in place.
    pub fn backward(&self, grad: &mut [f32], width: usize) {
        if self.factors.is_empty() {
            return;
        }
        grad.par_chunks_mut(ROWS * width)
            .zip(self.vectors.par_chunks(ROWS * width))
            .zip(self.factors.par_chunks(ROWS))
            .for_each(|((grad, vectors), factors)| normalise_backward(grad, vectors, factors, self.length));
    }
}
