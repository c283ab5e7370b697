//! The backend with a program in LlamaFactory's place that does what it would do to files.

use std::{fs, os::unix::fs::PermissionsExt, path::Path};

use serde_json::{Value, json};

use crate::{
    Failure, WorkerEvent,
    artifact::CheckpointInfo,
    testing::{Bench, refuses},
};

/// Reads `output_dir` and the model from the YAML, "trains" three steps, and fails once at step 2 where a file
/// `fail-once` says so.
const PROGRAM: &str = r#"#!/bin/sh
field() { sed -n "s/^$1: \"\(.*\)\"$/\1/p" "$2"; }
model=$(field model_name_or_path "$2")
if [ "$1" = export ]; then
  to=$(field export_dir "$2"); mkdir -p "$to"; cp "$model"/*.json "$model"/*.safetensors "$to"; rm -f "$to/grlm.json"
  exit 0
fi
out=$(field output_dir "$2"); here=$(dirname "$0")
cp "$2" "$here/seen.yaml"; cp "$(field dataset_dir "$2")"/*.json "$here"
echo "resuming: $(field resume_from_checkpoint "$2")"
for step in 1 2 3; do
  echo "{\"current_steps\": $step, \"total_steps\": 3, \"loss\": 1.$step, \"lr\": 0.1, \"epoch\": $step}" >> "$out/trainer_log.jsonl"
  mkdir -p "$out/checkpoint-$step"; touch "$out/checkpoint-$step/trainer_state.json" "$out/checkpoint-$step/optimizer.pt"
  if [ "$step" = 2 ] && [ -e "$here/fail-once" ]; then
    cause=$(cat "$here/fail-once"); rm "$here/fail-once"; echo "$cause" >&2; exit 1
  fi
done
cp "$model"/*.json "$model"/*.safetensors "$out"; rm -f "$out/grlm.json"
"#;

fn install(folder: &Path) -> String {
    let program = folder.join("llamafactory-cli");
    fs::write(&program, PROGRAM).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    program.display().to_string()
}

/// A model to start from, made by the stage itself.
fn model() -> crate::testing::Ran {
    let params = json!({
        "architecture": {"hidden": 16, "intermediate": 16, "layers": 1, "heads": 1, "kv_heads": 1, "head_dim": 8, "vocabulary": 512},
        "max_length": 64, "steps": 1, "template": "qwen3_nothink",
    });
    Bench::new().input("sft", samples(3)).run("train", params).unwrap()
}

fn samples(count: usize) -> String {
    let one = |i: usize| json!({"instruction": "Say", "input": i.to_string(), "output": format!("number {i}")});
    Value::Array((0..count).map(one).collect()).to_string()
}

#[test]
fn a_run_is_prepared_followed_and_handed_on() {
    let folder = tempfile::tempdir().unwrap();
    let base = model();
    for method in ["full", "lora"] {
        let params = json!({
            "method": method, "backend": "llamafactory", "max_length": 64, "weights": {"more": 0.5},
            "llamafactory": {"command": install(folder.path()), "deepspeed": "zero2"},
        });
        let ran = Bench::new()
            .input("sft", samples(4))
            .input("more", samples(2))
            .input("valid", samples(2))
            .input_path("model", base.path("checkpoint"))
            .run("train", params)
            .unwrap();
        let seen = fs::read_to_string(folder.path().join("seen.yaml")).unwrap();
        assert!(seen.contains(&format!("finetuning_type: \"{method}\"")), "{seen}");
        assert!(seen.contains("eval_dataset: \"grlm_valid\"") && seen.contains("deepspeed.json"));
        let read = |name: &str| -> Value {
            serde_json::from_str(&fs::read_to_string(folder.path().join(name)).unwrap()).unwrap()
        };
        assert_eq!(read("train.json").as_array().unwrap().len(), 5);
        assert_eq!(read("dataset_info.json")["grlm_train"]["file_name"], "train.json");
        assert_eq!(ran.lines("curve").len(), 3);
        let info = CheckpointInfo::read(ran.path("checkpoint")).unwrap();
        assert_eq!((info.method.as_str(), &info.trained_from["steps"]), (method, &json!(3)));
        grlm_nn::qwen3::Qwen3::load(ran.path("checkpoint")).unwrap();
        assert!(!ran.path("checkpoint").join("trainer_log.jsonl").exists());
    }
}

#[test]
fn a_run_that_failed_goes_on_from_its_last_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let base = model();
    let bench = Bench::new().input("sft", samples(4)).input_path("model", base.path("checkpoint"));
    let params = json!({
        "method": "full", "backend": "llamafactory", "max_length": 64,
        "llamafactory": {"command": install(folder.path())},
    });
    for (cause, failure) in [("disk trouble", Failure::Command), ("CUDA out of memory. Tried", Failure::OutOfMemory)] {
        fs::write(folder.path().join("fail-once"), cause).unwrap();
        let error = bench.run("train", params.clone()).err().unwrap();
        assert!(error.failure() == failure && error.to_string().contains(cause), "{error}");
    }
    let ran = bench.run("train", params).unwrap();
    let resumed = ran.logs().iter().any(|l| l.starts_with("resuming: ") && l.ends_with("checkpoint-2"));
    assert!(resumed, "{:?}", ran.logs());
    assert_eq!(ran.lines("curve").len(), 3, "steps that were repeated count once");
    assert!(ran.events.iter().all(|e| !matches!(e, WorkerEvent::Failed { .. })));
}

#[test]
fn what_is_missing_is_said() {
    let base = model();
    let params = |command: &str| json!({"method": "full", "backend": "llamafactory", "max_length": 64, "llamafactory": {"command": command}});
    let bench = Bench::new().input("sft", samples(4)).input_path("model", base.path("checkpoint"));
    refuses(bench.run("train", params("/no/such/program")), &["not installed", "pip install"]);
    let error = bench.run("train", params("false")).err().unwrap();
    assert_eq!(error.failure(), Failure::Command);
    let bench = bench.input("holdout", "{\"user\":\"u\",\"history\":[\"1\"],\"valid\":\"2\",\"test\":\"3\"}\n");
    refuses(bench.run("train", params("false")), &["held-out items", "validation.share"]);
}
