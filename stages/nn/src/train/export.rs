//! A trained model as a Hugging Face folder: `config.json`, `model.safetensors` (in parts, with their index, where it
//! is large) and `generation_config.json`. The tokenizer's files and `grlm.json` are the caller's.

use std::{fs, path::Path};

use serde_json::{Map, Value, json};

use super::{
    Layout,
    layout::Tensor,
    store::{self, Named, Stored},
};
use crate::{Error, qwen3::Config};

/// Bytes of one file of weights, as transformers cuts them.
const PART: usize = 5_000_000_000;

/// Writes the folder, which must exist.
///
/// # Errors
/// The disk is full, or the like.
pub fn write(folder: &Path, config: &Config, weights: &[f32], stored: Stored) -> Result<(), Error> {
    write_parts(folder, config, weights, stored, PART)
}

fn write_parts(folder: &Path, config: &Config, weights: &[f32], stored: Stored, part: usize) -> Result<(), Error> {
    let layout = Layout::new(config);
    let mut parts: Vec<Vec<&Tensor>> = vec![Vec::new()];
    let mut used = 0;
    for tensor in &layout.tensors {
        let size = tensor.range.len() * stored.bytes();
        if used > 0 && used + size > part {
            parts.push(Vec::new());
            used = 0;
        }
        used += size;
        if let Some(last) = parts.last_mut() {
            last.push(tensor);
        }
    }
    let mut map = Map::new();
    for (index, tensors) in parts.iter().enumerate() {
        let name = match parts.len() {
            1 => "model.safetensors".to_owned(),
            count => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
        };
        let named: Vec<Named> = tensors
            .iter()
            .map(|t| Named { name: &t.name, shape: &t.shape, values: &weights[t.range.clone()] })
            .collect();
        store::write(&folder.join(&name), &named, &[("format", "pt")], stored)?;
        map.extend(tensors.iter().map(|t| (t.name.clone(), Value::from(name.as_str()))));
    }
    if parts.len() > 1 {
        let index = json!({"metadata": {"total_size": layout.len * stored.bytes()}, "weight_map": map});
        write_json(&folder.join("model.safetensors.index.json"), &index)?;
    }
    write_json(&folder.join("config.json"), &config.to_json(stored.torch_name()))?;
    let mut generation = json!({"_from_model_config": true});
    let eos = match config.eos_tokens.as_slice() {
        [] => Value::Null,
        [one] => json!(one),
        many => json!(many),
    };
    for (name, value) in
        [("bos_token_id", json!(config.bos_token)), ("eos_token_id", eos), ("pad_token_id", json!(config.pad_token))]
    {
        if !value.is_null() {
            generation[name] = value;
        }
    }
    write_json(&folder.join("generation_config.json"), &generation)
}

fn write_json(path: &Path, value: &Value) -> Result<(), Error> {
    let text = serde_json::to_string_pretty(value).map_err(|e| Error::model(path, e.to_string()))?;
    fs::write(path, text + "\n").map_err(|e| Error::io("write", path, e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        qwen3::{Qwen3, Room, Wanted},
        train::{Batch, Model, init},
    };

    fn config(tied: bool) -> Config {
        Config {
            vocab_size: 50,
            hidden_size: 32,
            intermediate_size: 48,
            layers: 2,
            heads: 4,
            kv_heads: 2,
            head_dim: 8,
            max_positions: 64,
            rope_theta: 1e4,
            rms_norm_eps: 1e-6,
            tied,
            bos_token: Some(1),
            eos_tokens: vec![2],
            pad_token: Some(0),
            initializer_range: 0.2,
        }
    }

    /// What training computes is what the inference engine computes from the exported folder, whole or in parts.
    #[test]
    fn exported_folders_give_the_logits_of_training() {
        let tokens: Vec<u32> = (0..20).map(|i| i * 7 % 50).collect();
        for (tied, part) in [(true, PART), (false, 4000)] {
            let folder = tempfile::tempdir().unwrap();
            let weights = init::random(&config(tied), 3);
            write_parts(folder.path(), &config(tied), &weights, Stored::F32, part).unwrap();
            assert_eq!(folder.path().join("model.safetensors.index.json").exists(), part < PART);
            let mut batch = Batch::default();
            batch.push(&tokens, 1);
            let ours = Model::new(config(tied), weights.clone(), 64).logits(&batch);
            let engine = Qwen3::load(folder.path()).unwrap();
            let mut branches = engine.branches(None, Room::of(&[&tokens], 0)).unwrap();
            let hidden = engine.read(&mut branches, &[&tokens], Wanted::All, 1).unwrap();
            let theirs = engine.logits(&hidden, 1).unwrap();
            let apart = ours.iter().zip(&theirs).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(apart < 1e-4, "{apart}");
            let (read, again) = init::load(folder.path()).unwrap();
            assert_eq!(read, config(tied));
            assert_eq!(again, weights);
        }
    }

    #[test]
    fn bf16_is_rounded_and_named() {
        let folder = tempfile::tempdir().unwrap();
        let weights = init::random(&config(true), 3);
        write(folder.path(), &config(true), &weights, Stored::Bf16).unwrap();
        let (_, read) = init::load(folder.path()).unwrap();
        assert!(read.iter().zip(&weights).all(|(a, b)| (a - b).abs() <= b.abs() / 128.0));
        let text = fs::read_to_string(folder.path().join("config.json")).unwrap();
        assert!(text.contains("\"dtype\": \"bfloat16\""));
    }
}
