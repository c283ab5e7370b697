//! How much memory a training run takes: a formula, so that it can be said before the run.

use super::{Layout, layer::Tape};
use crate::qwen3::Config;

/// What decides about the memory of a run.
#[derive(Debug, Clone, Copy)]
pub struct Need {
    /// Numbers that are trained: all weights, or the adapters.
    pub trained: usize,
    /// Whether an average of them is kept too.
    pub averaged: bool,
    /// Tokens of the largest pass.
    pub pass_tokens: usize,
    /// Positions whose angles are kept.
    pub positions: usize,
    /// Whether layers are computed again in the backward pass.
    pub recompute: bool,
}

/// Bytes of a run at its peak, the program itself left out.
pub fn bytes(config: &Config, need: Need) -> u64 {
    let weights = Layout::new(config).len;
    let frozen = need.trained < weights;
    // Gradients and two moments; adapters are merged into a copy of the weights at the end.
    let copies = if need.averaged { 4 } else { 3 };
    let angles = need.positions * config.head_dim;
    let held = weights + copies * need.trained + angles + if frozen { weights + need.trained } else { 0 };
    4 * (held + pass_numbers(config, need)) as u64
}

/// Numbers held while a pass is computed.
fn pass_numbers(config: &Config, need: Need) -> usize {
    let (h, layers) = (config.hidden_size, config.layers);
    let all = config.query_width() + 2 * config.kv_width();
    let tape = Tape::numbers_per_token(config);
    let kept = if need.recompute { tape + (layers + 1) * h } else { layers * tape };
    let shared = 7 * h + 1 + config.intermediate_size.max(all) + all + config.query_width();
    // A block of logits, see `cross_entropy`.
    let logits = config.vocab_size * ((1 << 20) / config.vocab_size).clamp(16, 1024);
    need.pass_tokens * (kept + shared) + logits
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::{Batch, DropoutRates, Model, init};

    #[test]
    fn the_formula_is_what_a_pass_holds() {
        let config = Config {
            vocab_size: 600,
            hidden_size: 32,
            intermediate_size: 100,
            layers: 3,
            heads: 4,
            kv_heads: 2,
            head_dim: 12,
            max_positions: 4096,
            rope_theta: 1e4,
            ..Config::default()
        };
        for recompute in [false, true] {
            let mut model = Model::new(config.clone(), init::random(&config, 1), 4096);
            model.recompute(recompute);
            let mut batch = Batch::default();
            (0..8).for_each(|i| batch.push(&vec![i; 300], 1));
            let mut gradients = vec![0.0; model.weights.len()];
            model.loss_and_gradients(&batch, 1.0, DropoutRates::default(), &mut gradients);
            let trained = model.weights.len();
            let need = Need { trained, averaged: false, pass_tokens: batch.len(), positions: 4096, recompute };
            let (stated, held) = (pass_numbers(&config, need), model.workspace_len());
            assert!((stated as f64 / held as f64 - 1.0).abs() < 0.02, "{stated} stated, {held} held");
        }
    }
}
