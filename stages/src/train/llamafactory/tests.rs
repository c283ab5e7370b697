//! The backend with a program in LlamaFactory's place that does what it would do to files.

use std::{fs, os::unix::fs::PermissionsExt, path::Path, time::Instant};

use serde_json::{Value, json};

use crate::{
    Failure, Stage, WorkerEvent,
    artifact::CheckpointInfo,
    testing::{Bench, refuses},
    train::{Params, Train},
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

/// A file of the data set that the program was given.
fn read(folder: &Path, name: &str) -> Value {
    serde_json::from_str(&fs::read_to_string(folder.join(name)).unwrap()).unwrap()
}

/// A model to start from, made by the stage itself.
fn model() -> crate::testing::Ran {
    from_scratch(&samples(3), "qwen3_nothink")
}

fn from_scratch(samples: &str, template: &str) -> crate::testing::Ran {
    let shape = json!({
        "hidden": 16, "intermediate": 16, "layers": 1, "heads": 1, "kv_heads": 1, "head_dim": 8, "vocabulary": 512,
    });
    let params = json!({"architecture": shape, "max_length": 64, "steps": 1, "template": template});
    Bench::new().input("sft", samples).run("train", params).unwrap()
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
        assert_eq!(read(folder.path(), "train.json").as_array().unwrap().len(), 5);
        assert_eq!(read(folder.path(), "dataset_info.json")["grlm_train"]["file_name"], "train.json");
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

#[test]
fn a_layout_that_llamafactory_does_not_have_is_refused() {
    let compact = json!([{"output": "soap olive bar hand mild\n"}]).to_string();
    for (samples, words) in
        [(samples(3), ["template: none", "qwen3_nothink"]), (compact, ["whole words", "tokens: model"])]
    {
        let base = from_scratch(&samples, "none");
        let params = json!({"method": "full", "backend": "llamafactory", "max_length": 64});
        let bench = Bench::new().input("sft", &samples).input_path("model", base.path("checkpoint"));
        refuses(bench.run("train", params), &[words[0], words[1], "backend: grlm"]);
    }
}

#[test]
fn a_loss_that_is_not_finite_stops_the_run() {
    let folder = tempfile::tempdir().unwrap();
    let base = model();
    let program = install(folder.path());
    let params = json!({
        "method": "full", "backend": "llamafactory", "max_length": 64, "llamafactory": {"command": program},
    });
    // Once it ends by itself, once it would go on for a long time.
    for after in ["done", "done\nexec sleep 100"] {
        fs::write(&program, PROGRAM.replace("1.$step", "NaN").replace("done", after)).unwrap();
        let started = Instant::now();
        let bench = Bench::new().input("sft", samples(4)).input_path("model", base.path("checkpoint"));
        refuses(bench.run("train", params.clone()), &["the loss is not finite at step 1", "lower `lr`"]);
        assert!(started.elapsed().as_secs() < 50);
    }
}

#[test]
fn samples_are_counted_shortened_and_left_out() {
    let folder = tempfile::tempdir().unwrap();
    let base = model();
    let item = |i: usize| format!("Item text ID: [soap, olive, bar, hand, w{i}]\n");
    let long = json!({"instruction": "Go on.", "input": item(0), "output": (1..30).map(item).collect::<String>()});
    let silent = json!({"instruction": "Say", "output": ""});
    let short = json!({"instruction": "Say", "input": "one", "output": "1"});
    let bench =
        |samples: Value| Bench::new().input("sft", samples.to_string()).input_path("model", base.path("checkpoint"));
    let params = |more: Value| {
        let mut params = json!({
            "method": "full", "backend": "llamafactory", "max_length": 200,
            "llamafactory": {"command": install(folder.path())},
        });
        params.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        params
    };
    let ran = bench(json!([long, silent, short])).run("train", params(json!({}))).unwrap();
    let said = |words: &str| ran.logs().iter().any(|l| l.contains(words));
    assert!(said("1 samples were longer than 200 tokens and cut; 1 without a response left out"), "{:?}", ran.logs());
    let facts = CheckpointInfo::read(ran.path("checkpoint")).unwrap().trained_from;
    assert_eq!([&facts["samples"], &facts["samples_cut"], &facts["samples_without_response"]], [2, 1, 1]);
    let written = read(folder.path(), "train.json");
    let (histories, others): (Vec<_>, Vec<_>) =
        written.as_array().unwrap().iter().partition(|s| s["instruction"] == "Go on.");
    assert_eq!((histories.len(), others), (1, vec![&json!({"instruction": "Say", "input": "one", "output": "1"})]));
    assert!(histories[0]["output"].as_str().unwrap().ends_with(&item(29)), "the newest item stays");
    assert_ne!(histories[0]["input"], item(0));

    refuses(bench(json!([silent])).run("train", params(json!({}))), &["no sample has a response"]);
    refuses(bench(json!([short])).run("train", params(json!({"weights": {"sft": 0}}))), &["takes no sample"]);
}

#[test]
fn validation_looks_at_as_many_samples_as_it_should() {
    let folder = tempfile::tempdir().unwrap();
    let base = model();
    let bench = || Bench::new().input("sft", samples(10)).input_path("model", base.path("checkpoint"));
    let params = |validation: Value| {
        json!({
            "method": "full", "backend": "llamafactory", "max_length": 64, "validation": validation,
            "weights": {"sft": 2}, "llamafactory": {"command": install(folder.path())},
        })
    };
    let inputs = |name: &str| -> Vec<u64> {
        let samples = read(folder.path(), name);
        samples.as_array().unwrap().iter().map(|s| s["input"].as_str().unwrap().parse().unwrap()).collect()
    };
    bench().input("valid", samples(100)).run("train", params(json!({"users": 7}))).unwrap();
    let chosen = inputs("valid.json");
    assert_eq!((chosen.len(), inputs("train.json").len()), (7, 20));
    assert!(chosen.iter().any(|i| *i > 10), "not the first of the file: {chosen:?}");

    bench().run("train", params(json!({"share": 0.3, "users": 2}))).unwrap();
    let (held, learned) = (inputs("valid.json"), inputs("train.json"));
    assert_eq!((held.len(), learned.len()), (2, 14), "two of three are looked at, and seven learned twice");
    assert!(held.iter().all(|i| !learned.contains(i)));
    refuses(bench().run("train", params(json!({"share": 0.01}))), &["nothing is left to validate on"]);
}

#[test]
fn a_model_to_start_from_is_asked_for() {
    let issues = |params: Value, inputs: &[&str]| {
        let params: Params = serde_json::from_value(params).unwrap();
        let issues = params.check().into_iter().chain(Train::check_ports(&params, inputs, &[]));
        issues.map(|i| format!("{}: {} ({})\n", i.path, i.message, i.help.unwrap_or_default())).collect::<String>()
    };
    let full = json!({"method": "full", "backend": "llamafactory"});
    let said = issues(full.clone(), &["sft"]);
    assert!(said.contains("method: `method: full` needs a model") && said.contains("set `model: Qwen/"), "{said}");
    assert_eq!(issues(full, &["sft", "model"]), "");
    let named = json!({"method": "full", "backend": "llamafactory", "model": "Qwen/Qwen3-0.6B"});
    assert_eq!(issues(named, &["sft"]), "");
    refuses(Bench::new().input("sft", samples(3)).run("train", json!({"method": "lora"})), &["`method: lora` needs"]);
    let ignored = issues(json!({"lora": {"rank": 4}}), &["sft"]);
    assert!(ignored.starts_with("lora: is for `method: lora`"), "{ignored}");
}
