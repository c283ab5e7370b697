//! Training against torch: a step of the optimiser on a tiny model, computed by torch and stored (see
//! `fixtures/torch_step/make.py`).

use std::path::PathBuf;

use grlm_nn::train::{
    AdamWOptions, Corpus, Decay, Model, Sample, Schedule, Session, Settings, Source, init, store::Reader,
};
use serde::Deserialize;

const TOLERANCE: f32 = 1e-5;

#[derive(Deserialize)]
struct Stored {
    settings: Options,
    samples: Vec<Tokens>,
    losses: Vec<f64>,
    norms: Vec<f64>,
}

#[derive(Deserialize)]
struct Options {
    lr: f64,
    beta1: f64,
    beta2: f64,
    epsilon: f64,
    weight_decay: f64,
    clip: f64,
}

#[derive(Deserialize)]
struct Tokens {
    tokens: Vec<u32>,
    learned_from: usize,
}

/// Samples are packed here, and computed one by one there.
#[test]
fn steps_equal_those_of_torch() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/torch_step");
    let stored: Stored = serde_json::from_str(&std::fs::read_to_string(folder.join("step.json")).unwrap()).unwrap();
    let (config, weights) = init::load(&folder).unwrap();
    let samples: Vec<Sample> =
        stored.samples.iter().map(|s| Sample { tokens: s.tokens.clone(), learned_from: s.learned_from }).collect();
    let o = &stored.settings;
    for pass_tokens in [1000, 1] {
        let settings = Settings {
            batch: samples.len(),
            accumulation: 1,
            pass_tokens,
            optimizer: AdamWOptions {
                beta1: o.beta1,
                beta2: o.beta2,
                epsilon: o.epsilon,
                weight_decay: o.weight_decay,
                clip: o.clip,
            },
            schedule: Schedule { peak: o.lr, decay: Decay::Constant, warmup_steps: 0, total_steps: 2, floor: 0.0 },
            dropout: 0.0,
            averaging: 0.0,
            unit_embeddings: false,
            seed: 1,
        };
        let corpus = Corpus { sources: vec![Source { samples: samples.clone(), weight: 1.0 }] };
        let mut session = Session::new(Model::new(config.clone(), weights.clone(), 64), corpus, settings);
        for step in 0..2 {
            let stepped = session.step().unwrap();
            assert!((stepped.loss - stored.losses[step]).abs() < 1e-5, "{} {}", stepped.loss, stored.losses[step]);
            assert!((stepped.norm / stored.norms[step] - 1.0).abs() < 1e-5);
            let path = folder.join(format!("after_{}.safetensors", step + 1));
            let reader = Reader::open(&path).unwrap();
            for tensor in session.model().layout().tensors.clone() {
                let mut wanted = vec![0.0; tensor.range.len()];
                reader.read(&path, &tensor.name, &mut wanted).unwrap();
                let got = &session.model().weights[tensor.range.clone()];
                let worst = got.iter().zip(&wanted).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(worst < TOLERANCE, "{} is {worst} apart after step {}", tensor.name, step + 1);
            }
        }
    }
}
