//! The other side of `benches/lm_torch.py`: the same model on the same samples, trained by this crate.
//!
//! `lm_speed SETTINGS.json SAMPLES.json WEIGHTS` begins with the weights that the other side wrote, and prints
//! `{"tokens_per_s": …, "losses": […]}`.

use std::{env, error::Error, fs, time::Instant};

use grlm_nn::{
    qwen3::Config,
    train::{AdamW, AdamWOptions, Batch, DropoutRates, Model},
};
use serde::Deserialize;

#[derive(Deserialize)]
struct Settings {
    threads: usize,
    vocabulary: usize,
    hidden: usize,
    intermediate: usize,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    batch: usize,
    warmup: usize,
    steps: usize,
}

fn main() -> Result<(), Box<dyn Error>> {
    // As the program does: freed memory stays, so that it need not be cleared again.
    #[cfg(target_env = "gnu")]
    // SAFETY: called before any other thread exists.
    unsafe {
        libc::mallopt(libc::M_MMAP_MAX, 0);
        libc::mallopt(libc::M_TRIM_THRESHOLD, -1);
    }
    let mut arguments = env::args().skip(1);
    let mut read = || fs::read(arguments.next().unwrap_or_default());
    let s: Settings = serde_json::from_slice(&read()?)?;
    let samples: Vec<Vec<u32>> = serde_json::from_slice(&read()?)?;
    let weights = read()?;
    let weights = weights.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    let config = Config {
        vocab_size: s.vocabulary,
        hidden_size: s.hidden,
        intermediate_size: s.intermediate,
        layers: s.layers,
        heads: s.heads,
        kv_heads: s.kv_heads,
        head_dim: s.head_dim,
        max_positions: 1024,
        rope_theta: 1e4,
        ..Config::default()
    };
    let pool = rayon::ThreadPoolBuilder::new().num_threads(s.threads).build()?;
    let mut model = Model::new(config, weights, 1024);
    let mut optimizer = AdamW::new(model.trainable_tensors(), AdamWOptions::default());
    let mut gradients = vec![0.0; model.weights.len()];
    let (mut losses, mut spent, mut seen) = (Vec::new(), 0.0, 0);
    for (step, samples) in samples.chunks(s.batch).take(s.warmup + s.steps).enumerate() {
        let start = Instant::now();
        let mut batch = Batch::default();
        samples.iter().for_each(|sample| batch.push(sample, 1));
        let count = batch.targets.len();
        let loss = pool.install(|| {
            let scale = 1.0 / count as f32;
            let loss = model.loss_and_gradients(&batch, scale, DropoutRates::default(), &mut gradients);
            optimizer.step(model.trainable_mut(), &mut gradients, 1e-3);
            loss
        });
        losses.push(loss / count as f64);
        if step >= s.warmup {
            spent += start.elapsed().as_secs_f64();
            seen += batch.len();
        }
    }
    println!("{}", serde_json::json!({"tokens_per_s": seen as f64 / spent, "losses": losses}));
    Ok(())
}
