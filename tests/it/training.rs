//! A language model in training, killed and run again through the engine.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::environment::{Environment, Running};

const PIPELINE: &str = r#"
name: learn
stages:
  sft_rec:
    uses: sft_rec
    inputs: { id2meta: { file: id2meta.json }, sequences: { file: sequences.txt } }
    with: { format: compact }
  train:
    uses: train
    inputs: { sft: sft_rec.sft, holdout: sft_rec.holdout, id2meta: { file: id2meta.json } }
    with:
      architecture: { hidden: 32, intermediate: 64, layers: 2, heads: 2, kv_heads: 1, head_dim: 16 }
      max_length: 64
      steps: 400
      batch: 8
      dropout: 0.2
      averaging: 0.9
      validation: { users: 20, every: 30 }
      save_every: 20
    resources: { cpus: 1 }
"#;

const RANK: &str = r#"
name: rank
stages:
  sft_rec:
    uses: sft_rec
    inputs: { id2meta: { file: id2meta.json }, sequences: { file: sequences.txt } }
    with: { format: compact }
  generate:
    uses: generate
    inputs: { checkpoint: { file: checkpoint }, holdout: sft_rec.holdout, id2meta: { file: id2meta.json } }
    with: { beams: 6, top_n: 6 }
"#;

fn environment() -> Environment {
    let env = Environment::new();
    env.write("learn.yaml", PIPELINE);
    let record = |i: usize| {
        let words: Vec<String> = (0..5).map(|place| format!("w{}", i * (place + 1) % 30)).collect();
        (i.to_string(), json!({"id": i.to_string(), "summary_words": words}))
    };
    env.write("id2meta.json", &Value::Object((0..30).map(record).collect()).to_string());
    let line = |user: usize| {
        let items: Vec<String> = (0..8).map(|i| ((user * 7 + i * i) % 30).to_string()).collect();
        format!("u{user} {}\n", items.join(" "))
    };
    env.write("sequences.txt", &(0..60).map(line).collect::<String>());
    env
}

/// The checkpoint that training goes on from, wherever in the store it lies.
fn checkpoint(folder: &Path) -> Option<PathBuf> {
    fs::read_dir(folder).ok()?.flatten().map(|entry| entry.path()).find_map(|path| match path.is_dir() {
        true => checkpoint(&path),
        false => path.ends_with("checkpoint.safetensors").then_some(path),
    })
}

fn identity(env: &Environment) -> Option<u64> {
    checkpoint(&env.path(".grlm/scratch")).and_then(|path| fs::metadata(path).ok()).map(|data| data.ino())
}

/// The curve and the weights.
fn result(env: &Environment) -> (String, Vec<u8>) {
    let weights = fs::read(env.path("out/learn/train/checkpoint/model.safetensors")).unwrap();
    (env.read("out/learn/train/curve.jsonl"), weights)
}

#[test]
fn killed_five_times_it_ends_in_the_same_weights() {
    let undisturbed = environment();
    undisturbed.ok(&["run", "learn.yaml"]);
    let wanted = result(&undisturbed);
    assert_eq!(wanted.0.lines().count(), 14, "a look every 30 steps, and one at the end");

    let env = environment();
    for round in 0..5 {
        let before = identity(&env);
        let mut child = Running::start(&mut env.command(&["run", "learn.yaml"]));
        let start = Instant::now();
        while identity(&env).is_none_or(|now| Some(now) == before) {
            assert!(child.try_wait().unwrap().is_none(), "round {round}: it ended before it was killed");
            assert!(start.elapsed() < Duration::from_secs(120), "round {round}: no checkpoint");
            thread::sleep(Duration::from_millis(2));
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }
    env.ok(&["run", "learn.yaml"]);
    let mut logs = env.tree(".grlm/runs").into_iter().map(|(_, text)| String::from_utf8_lossy(&text).into_owned());
    assert!(logs.any(|text| text.contains("going on after step")));
    let found = result(&env);
    assert_eq!(found.0, wanted.0);
    assert!(found.1 == wanted.1, "the weights differ");
}

#[test]
fn one_more_user_costs_generation_one_user() {
    let env = environment();
    env.ok(&["run", "learn.yaml", "--set", "train.with.steps=20"]);
    fs::rename(env.path("out/learn/train/checkpoint"), env.path("checkpoint")).unwrap();
    env.write("rank.yaml", RANK);
    // Of the 60 users each history stands twice.
    assert_eq!(env.computed("rank.yaml", "generate"), Some(30));
    let before = env.read("out/rank/generate/rankings.jsonl");
    env.write("sequences.txt", &(env.read("sequences.txt") + "new 3 1 4 15 9 2 6\n"));
    assert_eq!(env.computed("rank.yaml", "generate"), Some(1));
    let after = env.read("out/rank/generate/rankings.jsonl");
    assert!(after.starts_with(&before) && after.lines().count() == 61);
}
