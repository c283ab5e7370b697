//! Weights to begin with: random ones for a model from scratch, or those of a model folder.

use std::path::Path;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::Layout;
use crate::{
    Error,
    qwen3::{Config, weights::Weights},
};

/// Random weights as transformers makes them: matrices normal with [`Config::initializer_range`] as their standard
/// deviation, norms 1.
pub fn random(config: &Config, seed: u64) -> Vec<f32> {
    let layout = Layout::new(config);
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut weights = vec![1.0; layout.len];
    for tensor in layout.tensors.iter().filter(|t| t.is_matrix()) {
        for pair in weights[tensor.range.clone()].chunks_mut(2) {
            // Box and Muller 1958; 1 − u is never 0.
            let (u, v): (f64, f64) = (random.random(), random.random());
            let radius = config.initializer_range * (-2.0 * (1.0 - u).ln()).sqrt();
            let angle = std::f64::consts::TAU * v;
            for (slot, value) in pair.iter_mut().zip([radius * angle.cos(), radius * angle.sin()]) {
                *slot = value as f32;
            }
        }
    }
    weights
}

/// The configuration and the weights of a model folder, in the layout's order.
///
/// # Errors
/// A file is missing or wrong, or the folder holds an encoder without an output head.
pub fn load(folder: &Path) -> Result<(Config, Vec<f32>), Error> {
    let config = Config::load(folder)?;
    let stored = Weights::open(folder, &config)?;
    if !stored.has_head(&config) {
        return Err(Error::model(folder, "the model has no output head, and cannot learn to write")
            .help("it is an encoder; train a language model"));
    }
    let layout = Layout::new(&config);
    let mut weights = vec![0.0; layout.len];
    for tensor in &layout.tensors {
        stored.get(&tensor.name)?.read(0, &mut weights[tensor.range.clone()]);
    }
    Ok((config, weights))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_weights_have_the_stated_spread() {
        let config = Config {
            vocab_size: 100,
            hidden_size: 64,
            intermediate_size: 128,
            layers: 1,
            heads: 4,
            kv_heads: 2,
            head_dim: 16,
            max_positions: 32,
            rope_theta: 1e4,
            rms_norm_eps: 1e-6,
            tied: true,
            bos_token: None,
            eos_tokens: Vec::new(),
            pad_token: None,
            initializer_range: 0.05,
        };
        let weights = random(&config, 1);
        let layout = Layout::new(&config);
        for tensor in &layout.tensors {
            let values = &weights[tensor.range.clone()];
            let mean = values.iter().map(|x| f64::from(*x)).sum::<f64>() / values.len() as f64;
            let deviation =
                (values.iter().map(|x| (f64::from(*x) - mean).powi(2)).sum::<f64>() / values.len() as f64).sqrt();
            let (wanted_mean, wanted) = if tensor.is_matrix() { (0.0, 0.05) } else { (1.0, 0.0) };
            assert!((mean - wanted_mean).abs() < 0.005 && (deviation - wanted).abs() < 0.005, "{}", tensor.name);
        }
        assert_eq!(weights, random(&config, 1));
        assert_ne!(weights, random(&config, 2));
    }
}
