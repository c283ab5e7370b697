//! AdamW (Loshchilov & Hutter 2019) over one flat array of weights, with decay on matrices only and gradients
//! clipped by their global norm.

use std::ops::Range;

use rayon::prelude::*;

use super::{kernels::with_simd, layout::Tensor};

/// Elements that one task updates.
const BLOCK: usize = 1 << 14;

/// Settings of the optimiser.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWOptions {
    pub beta1: f64,
    pub beta2: f64,
    pub epsilon: f64,
    pub weight_decay: f64,
    /// Gradients longer than this are scaled down to it; 0 clips nothing.
    pub clip: f64,
}

impl Default for AdamWOptions {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.1, clip: 1.0 }
    }
}

/// The optimiser's state: both moments, and the number of steps taken.
pub struct AdamW {
    options: AdamWOptions,
    /// Ranges of the flat array, and whether each decays.
    decays: Vec<(Range<usize>, bool)>,
    pub first: Vec<f32>,
    pub second: Vec<f32>,
    pub steps: u64,
}

impl AdamW {
    /// For weights that lie one after another as `tensors` say.
    pub fn new(tensors: &[Tensor], options: AdamWOptions) -> Self {
        let mut decays: Vec<(Range<usize>, bool)> = Vec::new();
        for tensor in tensors {
            match decays.last_mut() {
                Some((range, decay)) if *decay == tensor.is_matrix() => range.end = tensor.range.end,
                _ => decays.push((tensor.range.clone(), tensor.is_matrix())),
            }
        }
        let len = decays.last().map_or(0, |(range, _)| range.end);
        Self { options, decays, first: vec![0.0; len], second: vec![0.0; len], steps: 0 }
    }

    /// Takes one step, sets `gradients` to zero, and returns their norm before clipping. If that is not finite
    /// nothing is changed.
    pub fn step(&mut self, weights: &mut [f32], gradients: &mut [f32], learning_rate: f64) -> f64 {
        let o = self.options;
        let norm = norm(gradients);
        if !norm.is_finite() {
            return norm;
        }
        self.steps += 1;
        let clip = if o.clip > 0.0 && norm > o.clip { o.clip / norm } else { 1.0 };
        // Bias corrections are folded into the step size and epsilon's place, in double precision.
        let correction1 = 1.0 - o.beta1.powf(self.steps as f64);
        let correction2 = 1.0 - o.beta2.powf(self.steps as f64);
        let constants = Constants {
            clip: clip as f32,
            beta1: o.beta1 as f32,
            rest1: (1.0 - o.beta1) as f32,
            beta2: o.beta2 as f32,
            rest2: (1.0 - o.beta2) as f32,
            step: (learning_rate / correction1) as f32,
            root: (1.0 / correction2.sqrt()) as f32,
            epsilon: o.epsilon as f32,
        };
        for (range, decay) in &self.decays {
            let keep = if *decay { (1.0 - learning_rate * o.weight_decay) as f32 } else { 1.0 };
            let blocks = weights[range.clone()]
                .par_chunks_mut(BLOCK)
                .zip(gradients[range.clone()].par_chunks_mut(BLOCK))
                .zip(self.first[range.clone()].par_chunks_mut(BLOCK))
                .zip(self.second[range.clone()].par_chunks_mut(BLOCK));
            blocks.for_each(|(((w, g), m), v)| {
                with_simd(
                    #[inline(always)]
                    || constants.update(w, g, m, v, keep),
                );
            });
        }
        norm
    }
}

/// What every element's update shares.
#[derive(Clone, Copy)]
struct Constants {
    clip: f32,
    beta1: f32,
    rest1: f32,
    beta2: f32,
    rest2: f32,
    step: f32,
    root: f32,
    epsilon: f32,
}

impl Constants {
    #[inline(always)]
    fn update(self, w: &mut [f32], g: &mut [f32], m: &mut [f32], v: &mut [f32], keep: f32) {
        for (((w, g), m), v) in w.iter_mut().zip(g).zip(m).zip(v) {
            let gradient = *g * self.clip;
            *m = self.beta1 * *m + self.rest1 * gradient;
            *v = self.beta2 * *v + self.rest2 * gradient * gradient;
            *w = *w * keep - self.step * *m / (v.sqrt() * self.root + self.epsilon);
            *g = 0.0;
        }
    }
}

/// The Euclidean norm, in double precision, block by block in order.
fn norm(gradients: &[f32]) -> f64 {
    let blocks: Vec<f64> = gradients
        .par_chunks(BLOCK)
        .map(|block| {
            let mut lanes = [0.0f64; 8];
            with_simd(
                #[inline(always)]
                || {
                    let chunks = block.chunks_exact(8);
                    for (i, g) in chunks.remainder().iter().enumerate() {
                        lanes[i] += f64::from(*g) * f64::from(*g);
                    }
                    for chunk in chunks {
                        for (lane, g) in lanes.iter_mut().zip(chunk) {
                            *lane += f64::from(*g) * f64::from(*g);
                        }
                    }
                },
            );
            lanes.iter().sum()
        })
        .collect();
    blocks.iter().sum::<f64>().sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(shape: Vec<usize>, range: Range<usize>) -> Tensor {
        Tensor { name: String::new(), shape, range }
    }

    /// Three steps of the textbook formulas in double precision.
    #[test]
    fn steps_agree_with_the_formulas() {
        let options = AdamWOptions::default();
        let mut adam = AdamW::new(&[tensor(vec![1, 2], 0..2), tensor(vec![1], 2..3)], options);
        let mut weights = [0.5f32, -1.0, 2.0];
        let (mut w, mut m, mut v) = ([0.5f64, -1.0, 2.0], [0.0f64; 3], [0.0f64; 3]);
        for t in 1..=3 {
            let g: [f64; 3] = [3.0 * t as f64, -0.5, 1.0 / t as f64];
            let mut gradients = g.map(|x| x as f32);
            let norm = adam.step(&mut weights, &mut gradients, 0.01);
            let exact = g.iter().map(|x| x * x).sum::<f64>().sqrt();
            assert!((norm - exact).abs() < 1e-6);
            assert_eq!(gradients, [0.0; 3]);
            for i in 0..3 {
                let g = g[i] * (1.0 / exact).min(1.0);
                m[i] = 0.9 * m[i] + 0.1 * g;
                v[i] = 0.95 * v[i] + 0.05 * g * g;
                if i < 2 {
                    w[i] -= 0.01 * 0.1 * w[i];
                }
                let m_hat = m[i] / (1.0 - 0.9f64.powi(t));
                let v_hat = v[i] / (1.0 - 0.95f64.powi(t));
                w[i] -= 0.01 * m_hat / (v_hat.sqrt() + 1e-8);
                assert!((f64::from(weights[i]) - w[i]).abs() < 1e-6, "step {t}: {weights:?} {w:?}");
            }
        }
    }

    #[test]
    fn gradients_that_are_not_finite_change_nothing() {
        let mut adam = AdamW::new(&[tensor(vec![1], 0..1)], AdamWOptions::default());
        let mut weights = [1.0];
        assert!(adam.step(&mut weights, &mut [f32::NAN], 0.1).is_nan());
        assert_eq!((weights, adam.steps), ([1.0], 0));
    }
}
