//! The BERT network on a device: candle-transformers' own, in f32. Texts are filled up to the longest of them; what was
//! filled in is hidden from attention, and left out of what is returned.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::bert::{self, BertModel, HiddenAct};

use super::{Activation, BertConfig, config::POSITIONS};
use crate::{Error, qwen3::weights::Weights};

/// Weights on a device.
pub struct BertTensors {
    config: BertConfig,
    model: BertModel,
}

impl BertTensors {
    /// Copies weights to a device.
    ///
    /// # Errors
    /// As [`Weights::get`]; the device's memory is too small.
    pub fn load(config: BertConfig, weights: &Weights, device: &Device) -> Result<Self, Error> {
        // candle hides with a number that shorter types round to infinity, and gets NaN.
        let dtype = DType::F32;
        let mut tensors = HashMap::new();
        for (name, _) in config.tensors() {
            let mut tensor = weights.get(&name)?.on(device, dtype)?;
            if name == POSITIONS {
                // candle counts positions from 0.
                tensor = tensor.narrow(0, config.first_position, config.max_tokens())?;
            }
            tensors.insert(name, tensor);
        }
        let model = BertModel::load(VarBuilder::from_tensors(tensors, dtype, device), &described(&config))?;
        // Every thread has a stream of its own on the device: whoever computes must find the weights there.
        device.synchronize()?;
        Ok(Self { config, model })
    }

    pub fn config(&self) -> &BertConfig {
        &self.config
    }

    /// As [`super::Bert::read`].
    ///
    /// # Errors
    /// As [`super::Bert::read`]; the device fails.
    pub fn read(&self, texts: &[&[u32]]) -> Result<Vec<f32>, Error> {
        texts.iter().try_for_each(|tokens| self.config.check(tokens))?;
        let longest = texts.iter().map(|tokens| tokens.len()).max().unwrap_or(0);
        if longest == 0 {
            return Ok(Vec::new());
        }
        let filled = |of: &dyn Fn(&u32) -> u32| -> Result<Tensor, Error> {
            let row = |tokens: &&[u32]| tokens.iter().map(of).chain(std::iter::repeat(0)).take(longest).collect();
            let rows: Vec<Vec<u32>> = texts.iter().map(row).collect();
            Ok(Tensor::new(rows, &self.model.device)?)
        };
        let (tokens, is_token) = (filled(&|token| *token)?, filled(&|_| 1)?);
        let hidden = self.model.forward(&tokens, &tokens.zeros_like()?, Some(&is_token))?;
        let hidden: Vec<f32> = hidden.flatten_all()?.to_vec1()?;
        let width = self.config.hidden_size;
        let own = hidden.chunks_exact(longest * width).zip(texts).flat_map(|(rows, text)| &rows[..text.len() * width]);
        Ok(own.copied().collect())
    }
}

/// The shape as candle has it.
fn described(config: &BertConfig) -> bert::Config {
    bert::Config {
        vocab_size: config.vocab_size,
        hidden_size: config.hidden_size,
        num_hidden_layers: config.layers,
        num_attention_heads: config.heads,
        intermediate_size: config.intermediate_size,
        hidden_act: match config.activation {
            Activation::Gelu => HiddenAct::Gelu,
            Activation::GeluTanh => HiddenAct::GeluApproximate,
            Activation::Relu => HiddenAct::Relu,
        },
        max_position_embeddings: config.max_tokens(),
        type_vocab_size: config.token_types,
        layer_norm_eps: f64::from(config.layer_norm_eps),
        ..bert::Config::default()
    }
}
