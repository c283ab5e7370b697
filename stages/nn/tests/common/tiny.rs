//! A tiny model with random weights, and TIDs for it.

use std::path::Path;

use grlm_nn::qwen3::{Config, Qwen3};

/// Numbers that look random, the same everywhere.
pub struct Noise(pub u64);

impl Noise {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }

    /// In −1..1.
    pub fn float(&mut self) -> f32 {
        self.next() as f32 / (1u64 << 30) as f32 - 1.0
    }

    pub fn tokens(&mut self, count: usize, vocabulary: u32) -> Vec<u32> {
        (0..count).map(|_| (self.next() % u64::from(vocabulary)) as u32).collect()
    }
}

/// A model with random weights.
pub fn made_up(folder: &Path) -> Qwen3 {
    let config = Config {
        vocab_size: 200,
        hidden_size: 32,
        intermediate_size: 48,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        head_dim: 8,
        max_positions: 256,
        rope_theta: 1e4,
        eos_tokens: vec![2],
        ..Config::default()
    };
    std::fs::write(folder.join("config.json"), config.to_json("float32").to_string()).unwrap();
    let mut noise = Noise(5);
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = config
        .tensors()
        .into_iter()
        .map(|(name, shape)| {
            let value =
                |noise: &mut Noise| if name.contains("norm") { 1.0 + 0.3 * noise.float() } else { 0.4 * noise.float() };
            let bytes = (0..shape.iter().product()).flat_map(|_| value(&mut noise).to_le_bytes()).collect();
            (name, shape, bytes)
        })
        .collect();
    let views = tensors.iter().map(|(name, shape, bytes)| {
        (name, safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes).unwrap())
    });
    safetensors::serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
    Qwen3::load(folder).unwrap()
}

/// TIDs of unequal length that share beginnings; some go on where others end.
pub fn tids(count: usize, vocabulary: u32) -> Vec<Vec<u32>> {
    let mut noise = Noise(77);
    let mut all = std::collections::BTreeSet::new();
    while all.len() < count {
        let mut tid = noise.tokens(2, 9);
        let rest = 1 + noise.next() as usize % 4;
        tid.extend(noise.tokens(rest, vocabulary));
        all.insert(tid);
    }
    all.into_iter().collect()
}
