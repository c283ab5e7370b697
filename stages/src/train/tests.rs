//! The stage as the engine runs it, on small samples.

use std::fs;

use grlm_nn::qwen3::{Qwen3, Room, Wanted};
use serde_json::{Value, json};

use super::{Params, Train};
use crate::{
    Compat, Failure, Stage,
    artifact::{CheckpointInfo, Id2Meta, SftFormat, TokenKind},
    lm::Layout,
    testing::{Bench, Ran, refuses},
};

const ITEMS: usize = 12;

fn word(item: usize, place: usize) -> String {
    // The first word is shared by three items, so that a TID needs more than one.
    if place == 0 { format!("kind{}", item / 3) } else { format!("w{item}-{place}") }
}

fn id2meta() -> String {
    let all: serde_json::Map<String, Value> = (0..ITEMS)
        .map(|i| {
            let words: Vec<String> = (0..5).map(|p| word(i, p)).collect();
            (i.to_string(), json!({"id": i.to_string(), "title": format!("Item {i}"), "summary_words": words}))
        })
        .collect();
    Value::Object(all).to_string()
}

/// Every user walks round the circle of all items.
fn sequences() -> String {
    let line = |user: usize| {
        let items: Vec<String> = (0..6 + user % 4).map(|i| ((user * 5 + i) % ITEMS).to_string()).collect();
        format!("u{user} {}\n", items.join(" "))
    };
    (0..40).map(line).collect()
}

fn builder(format: &str) -> Ran {
    Bench::new()
        .input("id2meta", id2meta())
        .input("sequences", sequences())
        .run("sft_rec", json!({"format": format}))
        .unwrap()
}

fn bench(rec: &Ran) -> Bench {
    Bench::new().threads(2).input_path("sft", rec.path("sft")).input("id2meta", id2meta())
}

fn small(more: Value) -> Value {
    let mut params = json!({
        "architecture": {
            "hidden": 32, "intermediate": 64, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 16, "vocabulary": 600,
            "init_std": 0.1,
        },
        "max_length": 512, "epochs": 30, "batch": 8, "lr": 0.01,
    });
    for (key, value) in more.as_object().unwrap() {
        params[key] = value.clone();
    }
    params
}

/// What the model writes after a history, greedily, as items of the catalogue.
fn answers(folder: &std::path::Path, histories: &[&[usize]]) -> Vec<usize> {
    let (layout, _) = Layout::open(folder).unwrap();
    let engine = Qwen3::load(folder).unwrap();
    let catalogue = folder.join("../id2meta.json");
    fs::write(&catalogue, id2meta()).unwrap();
    let catalogue = Id2Meta::read(&catalogue).unwrap();
    let records = catalogue.records();
    histories
        .iter()
        .map(|history| {
            let history: Vec<_> = history.iter().map(|&i| &records[i]).collect();
            let prompt = layout.prompt(&history, Compat::Fixed, 40).unwrap().tokens;
            let score = |item: usize| {
                let tid = layout.tid(&records[item], Compat::Fixed).unwrap().unwrap();
                let tokens: Vec<u32> = prompt.iter().chain(&tid).copied().collect();
                let mut branches = engine.branches(None, Room::of(&[&tokens], 0)).unwrap();
                let hidden = engine.read(&mut branches, &[&tokens], Wanted::All, 1).unwrap();
                let logits = engine.logits(&hidden, 1).unwrap();
                let v = engine.config().vocab_size;
                let at = |i: usize| {
                    let row = &logits[(prompt.len() + i - 1) * v..(prompt.len() + i) * v];
                    let top = row.iter().copied().fold(f32::MIN, f32::max);
                    row[tid[i] as usize] - top - row.iter().map(|x| (x - top).exp()).sum::<f32>().ln()
                };
                (0..tid.len()).map(at).sum::<f32>()
            };
            let scores: Vec<f32> = (0..ITEMS).map(score).collect();
            (0..ITEMS).max_by(|&a, &b| scores[a].total_cmp(&scores[b])).unwrap()
        })
        .collect()
}

const HISTORIES: [&[usize]; 4] = [&[3, 4, 5], &[9, 10], &[0, 1, 2, 3, 4], &[10, 11]];
const NEXT: [usize; 4] = [6, 11, 5, 0];

#[test]
fn a_model_that_only_tells_what_the_catalogue_allows_apart_learns_it_too() {
    let rec = builder("compact");
    for (tokens, kind) in [("words", TokenKind::Words), ("prefixes", TokenKind::Prefixes)] {
        let settings = json!({
            "normalize": "allowed", "unit_embeddings": true, "averaging": 0.9, "tokens": tokens,
            "validation": {"recall": true, "every": 50},
        });
        let ran = bench(&rec).input_path("holdout", rec.path("holdout")).run("train", small(settings)).unwrap();
        let info = CheckpointInfo::read(ran.path("checkpoint")).unwrap();
        assert_eq!((info.tokens, &info.trained_from["normalize"]), (kind, &json!("allowed")));
        assert!(info.trained_from["valid_recall@10"].as_f64() > Some(0.99), "{tokens}");
        assert!(info.trained_from["valid_loss"].as_f64().unwrap() < 0.3, "{tokens}");
        // Of the histories' items one token a word, or the kind and the item.
        let items: u64 = (0..40).map(|user| 4 + user % 4).sum();
        let an_item = if tokens == "words" { 5 } else { 2 };
        assert_eq!(info.trained_from["learned_tokens"], items * an_item);

        let ask = |decoding: &str| {
            let bench = Bench::new().input_path("checkpoint", ran.path("checkpoint")).input("id2meta", id2meta());
            let normalize = if decoding == "free" { "full" } else { "allowed" };
            let params = json!({"decoding": decoding, "normalize": normalize, "top_n": 1});
            bench.input_path("holdout", rec.path("holdout")).run("generate", params)
        };
        for line in ask("catalogue").unwrap().lines("rankings") {
            assert_eq!(line["items"][0], line["target"], "{line}");
        }
        if tokens == "prefixes" {
            refuses(ask("free"), &["tokens: prefixes", "decoding: catalogue"]);
        }
    }

    let without = Bench::new().input_path("sft", rec.path("sft"));
    assert!(
        without.run("train", small(json!({"normalize": "allowed"}))).unwrap_err().to_string().contains("catalogue")
    );
    let text = builder("text");
    let refused = bench(&text).run("train", small(json!({"normalize": "allowed"}))).unwrap_err().to_string();
    assert!(refused.contains("one token a word"), "{refused}");
}

#[test]
fn a_compact_model_from_scratch_learns_the_next_item() {
    let rec = builder("compact");
    let ran = bench(&rec).input_path("holdout", rec.path("holdout")).run("train", small(json!({}))).unwrap();
    let folder = ran.path("checkpoint");
    assert_eq!(answers(folder, &HISTORIES), NEXT);

    let info = CheckpointInfo::read(folder).unwrap();
    assert_eq!((info.format, info.tokens, info.bos.as_deref()), (SftFormat::Compact, TokenKind::Words, Some("<s>")));
    assert_eq!(info.trained_from["samples"], 40);
    assert!(info.trained_from["valid_loss"].as_f64().unwrap() < 0.5);
    let curve = ran.lines("curve");
    assert_eq!(curve.len(), 30, "a look at every epoch");
    assert!(curve[0]["valid_loss"].as_f64() > curve[29]["valid_loss"].as_f64());
    assert!(curve.iter().all(|p| p.get("tokens_per_s").is_none() && p["lr"].as_f64().is_some()));
    for file in ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"] {
        assert!(folder.join(file).exists(), "{file}");
    }
}

#[test]
fn the_best_model_is_chosen_by_recall_where_asked() {
    let rec = builder("compact");
    let params = small(json!({"epochs": 10, "validation": {"recall": true, "beams": 12, "patience": 3}}));
    let ran = bench(&rec).input_path("holdout", rec.path("holdout")).run("train", params).unwrap();
    let curve = ran.lines("curve");
    let best = curve.iter().filter_map(|p| p["metric"].as_f64()).fold(0.0, f64::max);
    // All 12 items fit into the first ten but two, so even an untrained model finds most.
    assert!(best > 0.9, "{curve:?}");
    let info = CheckpointInfo::read(ran.path("checkpoint")).unwrap();
    assert_eq!(info.trained_from["valid_recall@10"], json!(best));
}

#[test]
fn a_text_model_from_scratch_learns_the_next_item() {
    let rec = builder("text");
    let params = small(json!({"epochs": 25, "template": "qwen3_nothink", "save_as": "f32"}));
    let ran = bench(&rec).run("train", params).unwrap();
    assert_eq!(answers(ran.path("checkpoint"), &HISTORIES), NEXT);
    let info = CheckpointInfo::read(ran.path("checkpoint")).unwrap();
    assert!(info.format == SftFormat::Text && info.tokens == TokenKind::Model && info.bos.is_none());
    assert!(!info.instruction.is_empty());
}

/// A model from scratch is adapted to walk round the circle the other way.
#[test]
fn a_trained_model_is_trained_further() {
    let rec = builder("compact");
    let first = bench(&rec).run("train", small(json!({}))).unwrap();
    let backwards: String = (0..40)
        .map(|user: usize| {
            let items: Vec<String> = (0..8).map(|i| ((user * 5 + 8 * ITEMS - i) % ITEMS).to_string()).collect();
            format!("u{user} {}\n", items.join(" "))
        })
        .collect();
    let other = Bench::new()
        .input("id2meta", id2meta())
        .input("sequences", backwards)
        .run("sft_rec", json!({"format": "compact"}))
        .unwrap();
    for (method, lr) in [("full", 0.005), ("lora", 0.02)] {
        let params = small(json!({"method": method, "lr": lr, "epochs": 25, "lora": {"rank": 8, "dropout": 0.05}}));
        let ran = bench(&other).input_path("model", first.path("checkpoint")).run("train", params).unwrap();
        assert_eq!(answers(ran.path("checkpoint"), &[&[5, 4, 3], &[1, 0]]), [2, 11], "{method}");
        let info = CheckpointInfo::read(ran.path("checkpoint")).unwrap();
        assert_eq!((info.method.as_str(), info.tokens, info.bos.as_deref()), (method, TokenKind::Words, Some("<s>")));
    }
}

#[test]
fn the_same_again_gives_the_same_bytes() {
    let rec = builder("compact");
    let weights = |threads: usize| {
        let ran = bench(&rec).threads(threads).run("train", small(json!({"steps": 5, "dropout": 0.1}))).unwrap();
        fs::read(ran.path("checkpoint").join("model.safetensors")).unwrap()
    };
    assert!(weights(1) == weights(2));
}

#[test]
fn files_are_mixed_by_weight() {
    let rec = builder("compact");
    let more =
        json!([{"output": "kind0 w0-1 w0-2 w0-3 w0-4\n"}, {"output": "kind0 w1-1 w1-2 w1-3 w1-4\n"}]).to_string();
    let bench = bench(&rec).input("extra", more);
    let ran = bench.run("train", small(json!({"epochs": 1, "weights": {"sft": 0.5, "extra": 4}}))).unwrap();
    let info = CheckpointInfo::read(ran.path("checkpoint")).unwrap();
    // 20 of 40 samples, and 2 samples four times, 8 to a step.
    assert_eq!(info.trained_from["steps"], 4);
    assert!(ran.logs().iter().any(|l| l.contains("`extra` (weight 4): 2 samples")), "{:?}", ran.logs());
    refuses(bench.run("train", small(json!({"weights": {"other": 1}}))), &["`other`", "sft, extra"]);
}

#[test]
fn bad_input_is_named() {
    let run = |sft: Value, params: Value| {
        Bench::new().input("sft", sft.to_string()).input("id2meta", id2meta()).run("train", small(params))
    };
    let one = |output: &str| json!([{"instruction": "Say", "input": "it", "output": output}]);
    refuses(run(json!([]), json!({})), &["holds no sample"]);
    refuses(run(one(""), json!({})), &["no sample has a response", "train_on_prompt"]);
    refuses(run(one("x"), json!({"tokens": "words"})), &["not lines of five words", "tokens: model"]);
    let mixed = json!([
        {"output": "a b c d e\n"},
        {"instruction": "Go", "input": "Item text ID: [a, b, c, d, e]\n", "output": "Item text ID: [a, b, c, d, f]\n"}
    ]);
    refuses(run(mixed, json!({})), &["histories as text", "same `format`"]);
    refuses(run(one("x"), json!({"validation": {"recall": true}, "epochs": 1})), &["validation.recall", "holdout"]);
    refuses(run(one("x"), json!({"model": "no such"})), &["model"]);
    refuses(run(one("x"), json!({"weight_decay": -1})), &["weight_decay"]);

    let nothing = json!({"validation": {"share": 0.1}, "epochs": 1});
    refuses(run(one("x"), nothing), &["nothing is left to validate on", "validation.share"]);
    let crowded = json!({"template": "qwen3", "max_length": 16, "tokens": "model"});
    refuses(run(one("x"), crowded), &["no response has room within 16 tokens", "raise `max_length`"]);
    let compact = json!([{"output": "a b c d e\n"}]);
    refuses(run(compact, json!({"template": "qwen3"})), &["have no template", "tokens: model"]);

    // Longer than the context: counted, cut, and the answer stays.
    let long = json!([{"instruction": "Say", "input": "it ".repeat(900), "output": "yes"}]);
    let ran = run(long, json!({"epochs": 1, "max_length": 64})).unwrap();
    let info = CheckpointInfo::read(ran.path("checkpoint")).unwrap();
    assert_eq!(info.trained_from["samples_cut"], 1);
    assert!(info.trained_from["learned_tokens"].as_u64() >= Some(2), "{:?}", info.trained_from);
    assert!(ran.logs().iter().any(|l| l.contains("1 samples were longer than 64 tokens")));
}

#[test]
fn words_that_a_model_does_not_know_are_not_learned() {
    let first = bench(&builder("compact")).run("train", small(json!({"steps": 1}))).unwrap();
    let elsewhere = |samples: Value| {
        let params = small(json!({"method": "full", "steps": 1}));
        Bench::new()
            .input("sft", samples.to_string())
            .input_path("model", first.path("checkpoint"))
            .run("train", params)
    };
    let known = json!({"output": "kind0 w0-1 w0-2 w0-3 w0-4\n"});
    let foreign = json!({"output": "foo bar baz qux quux\n"});
    refuses(elsewhere(json!([foreign])), &["5 of 5 learned tokens", "another catalogue"]);
    let ran = elsewhere(json!([known, known, foreign])).unwrap();
    assert!(ran.logs().iter().any(|l| l.contains("5 of the learned tokens are words that")), "{:?}", ran.logs());
}

#[test]
fn a_step_takes_no_sample_twice() {
    let rec = builder("compact");
    for (batch, accumulation) in [(64, 3), (16, 3)] {
        let with = json!({"epochs": 2, "batch": batch, "accumulation": accumulation});
        let ran = bench(&rec).run("train", small(with)).unwrap();
        let info = CheckpointInfo::read(ran.path("checkpoint")).unwrap();
        assert_eq!((&info.trained_from["steps"], &info.trained_from["epochs"]), (&json!(2), &json!(2.0)));
        let said = format!("{} samples is more than an epoch has: it takes 40", batch * accumulation);
        assert!(ran.logs().iter().any(|l| l.contains(&said)), "{:?}", ran.logs());
    }
}

#[test]
fn inputs_that_contradict_each_other_are_found_before_the_run() {
    let issues = |params: Value, inputs: &[&str]| {
        let params = serde_json::from_value(params).unwrap();
        Train::check_ports(&params, inputs, &[]).iter().map(|issue| format!("{issue:?}")).collect::<String>()
    };
    assert_eq!(issues(json!({}), &["sft", "holdout", "id2meta"]), "");
    assert!(issues(json!({}), &["sft", "holdout", "valid", "id2meta"]).contains("both `holdout` and `valid`"));
    assert!(issues(json!({}), &["sft", "holdout"]).contains("no `id2meta`"));
    assert!(issues(json!({"validation": {"recall": true}}), &["sft"]).contains("held-out"));
    assert!(issues(json!({"validation": {"patience": 2}}), &["sft"]).contains("nothing to validate on"));
    assert!(issues(json!({"weights": {"other": 1}}), &["sft"]).contains("weight of no input"));
}

#[test]
fn what_would_fit_is_known_before_the_run() {
    let first = bench(&builder("compact")).run("train", small(json!({"steps": 1}))).unwrap();
    let further = json!({"method": "full", "model": first.path("checkpoint"), "max_length": 512});
    for params in [small(json!({})), further] {
        let params: Params = serde_json::from_value(params).unwrap();
        let needed = Train::resources(&params).memory;
        assert!(needed > 1 << 20, "{needed}");
        assert_eq!(Train::fitting(&params, needed), None);
        assert!(Train::fitting(&params, needed / 2).unwrap().contains("`gradient_checkpointing: true`"));
    }
    let unknown: Params = serde_json::from_value(json!({"method": "full", "model": "Qwen/Qwen3-4B"})).unwrap();
    assert_eq!((Train::resources(&unknown).memory, Train::fitting(&unknown, 1)), (0, None));
}

#[test]
fn numbers_without_bounds_are_refused() {
    let found = |params: Value| {
        let params: Params = serde_json::from_value(params).unwrap();
        params.check().iter().map(|issue| issue.path.clone()).collect::<Vec<_>>()
    };
    assert_eq!(found(json!({"batch": u64::MAX})), ["batch"]);
    assert_eq!(found(json!({"batch": 100_000, "accumulation": 101})), ["batch"]);
    assert_eq!(found(json!({"max_length": 1_000_000})), ["max_length"]);
    assert_eq!(found(json!({"weights": {"sft": 1e9}})), ["weights.sft"]);
}

#[test]
fn a_model_that_does_not_fit_is_refused() {
    let rec = builder("compact");
    let first = bench(&rec).run("train", small(json!({"steps": 1}))).unwrap();
    let folder = first.path("checkpoint");
    let full = || bench(&rec).input_path("model", folder).run("train", small(json!({"method": "full", "steps": 1})));
    full().unwrap();
    let config = folder.join("config.json");
    let text = fs::read_to_string(&config).unwrap();
    let with = |name: &str, value: Value| {
        let mut changed: Value = serde_json::from_str(&text).unwrap();
        changed[name] = value;
        fs::write(&config, changed.to_string()).unwrap();
        full()
    };
    refuses(with("hidden_size", json!(48)), &["has the shape", "different models"]);
    refuses(with("vocab_size", json!(9)), &["tokenizer.json", "and the model 9"]);
    refuses(with("max_position_embeddings", json!(64)), &["64 positions", "max_length: 64"]);
    refuses(with("num_hidden_layers", json!(1)), &["have 2 layers", "says 1"]);
    refuses(with("eos_token_id", json!(60_000)), &["tokenizer.json", "end with token 60000"]);
    fs::write(&config, &text).unwrap();
    fs::remove_file(folder.join("tokenizer.json")).unwrap();
    refuses(full(), &["tokenizer.json", "no such file"]);
}

#[test]
fn numbers_that_are_not_finite_stop_the_run() {
    let rec = builder("compact");
    let error = bench(&rec).run("train", small(json!({"lr": 1e30, "clip": 0, "warmup": 0}))).err().unwrap();
    assert_eq!(error.failure(), Failure::WrongInput);
    assert!(error.to_string().contains("not finite at step"), "{error}");
    assert!(error.help_text().unwrap().contains("lower learning rate"));
}

/// Both kinds of tokenizer; needs a Python with transformers, named by `GRLM_PYTHON`.
#[test]
fn transformers_reads_the_folder_and_computes_the_same() {
    let Some(python) = std::env::var_os("GRLM_PYTHON") else {
        eprintln!("skipped: GRLM_PYTHON does not name a Python with transformers");
        return;
    };
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../scripts/transformers_logits.py");
    for (format, text) in
        [("compact", "<s> kind0 w1-1 w1-2 w1-3 w1-4 kind1"), ("text", "Item text ID: [kind0, w1-1, é]")]
    {
        let ran = bench(&builder(format)).run("train", small(json!({"steps": 20}))).unwrap();
        let folder = ran.path("checkpoint");
        let mut child = std::process::Command::new(&python)
            .args([script.as_ref(), folder.as_os_str()])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        std::io::Write::write_all(&mut child.stdin.take().unwrap(), text.as_bytes()).unwrap();
        let out = child.wait_with_output().unwrap();
        assert!(out.status.success());
        let theirs: Value = serde_json::from_slice(&out.stdout).unwrap();
        let (layout, _) = Layout::open(folder).unwrap();
        let tokens = layout.tokenizer().encode(text).unwrap();
        assert_eq!(json!(tokens), theirs["tokens"], "{format}");
        let engine = Qwen3::load(folder).unwrap();
        let mut branches = engine.branches(None, Room::of(&[&tokens], 0)).unwrap();
        let hidden = engine.read(&mut branches, &[&tokens], Wanted::All, 1).unwrap();
        let ours = engine.logits(&hidden, 1).unwrap();
        let theirs = theirs["logits"].as_array().unwrap().iter().flat_map(|row| row.as_array().unwrap());
        let apart = ours.iter().zip(theirs).map(|(a, b)| (f64::from(*a) - b.as_f64().unwrap()).abs());
        let worst = apart.fold(0.0, f64::max);
        assert!(worst < 1e-4, "{format}: {worst} apart");
    }
}
