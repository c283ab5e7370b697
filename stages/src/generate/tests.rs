//! The stage on a made-up catalogue and models with random weights.

use std::{collections::BTreeMap, fs, path::Path};

use grlm_nn::{Tokenizer, qwen3::Config};
use serde_json::{Map, Value, json};

use super::*;
use crate::{
    StopFlag,
    artifact::{ChatTemplate, CheckpointInfo, SftFormat, TokenKind, checkpoint::CHECKPOINT_VERSION},
    rows::MemoryMemo,
    testing::{Bench, Ran, refuses},
};

const WORDS: [&str; 8] = ["soap", "hair", "mild", "dry", "oil", "brush", "care", "men"];

fn id2meta() -> String {
    let mut all = Map::new();
    for n in 0..40 {
        let id = format!("i{n}");
        let fields = json!({"id": id, "title": format!("Thing {n}"), "summary_words": words(n)});
        all.insert(id, fields);
    }
    Value::Object(all).to_string()
}

/// The TID of item `n` of 40; items 38 and 39 share one.
fn words(n: usize) -> Vec<&'static str> {
    let n = n.min(38);
    vec![WORDS[n % 8], WORDS[n / 8], WORDS[(n + 3) % 8], WORDS[n % 5], WORDS[7]]
}

fn holdout(users: usize) -> String {
    (0..users)
        .map(|u| {
            let item = |k: usize| format!("i{}", (u * 7 + k * 3) % 40);
            let history: Vec<String> = (0..1 + u % 4).map(item).collect();
            json!({"user": format!("u{u}"), "history": history, "valid": item(5), "test": item(6)}).to_string() + "\n"
        })
        .collect()
}

/// A checkpoint as `train` writes it, with random weights.
fn checkpoint(folder: &Path, format: SftFormat) {
    fs::create_dir_all(folder).unwrap();
    let (tokenizer, tokens, bos) = match format {
        SftFormat::Compact => (Tokenizer::of_words(WORDS).unwrap(), TokenKind::Words, "<s>"),
        SftFormat::Text => {
            let text = format!("Go on.\nItem text ID: [{}] Title: Thing 12.\n", WORDS.join(", "));
            (Tokenizer::learn([text.as_str()].into_iter(), 300).unwrap(), TokenKind::Model, "<|endoftext|>")
        }
    };
    tokenizer.save(folder).unwrap();
    let info = CheckpointInfo {
        version: CHECKPOINT_VERSION,
        format,
        tokens,
        template: ChatTemplate::None,
        bos: Some(bos.into()),
        instruction: if format == SftFormat::Text { "Go on.\n".into() } else { String::new() },
        max_length: 400,
        method: "scratch".into(),
        trained_from: Map::new(),
    };
    info.write(folder).unwrap();
    let config = Config {
        vocab_size: tokenizer.size(),
        hidden_size: 16,
        intermediate_size: 24,
        layers: 1,
        heads: 2,
        kv_heads: 1,
        head_dim: 8,
        max_positions: 512,
        rope_theta: 1e4,
        ..Config::default()
    };
    fs::write(folder.join("config.json"), config.to_json("float32").to_string()).unwrap();
    let (mut header, mut data, mut state) = (Map::new(), Vec::new(), 9u64);
    for (name, shape) in config.tensors() {
        let start = data.len();
        for _ in 0..shape.iter().product() {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let noise = (state >> 33) as f32 / (1u64 << 30) as f32 - 1.0;
            data.extend((if name.contains("norm") { 1.0 } else { 0.5 * noise }).to_le_bytes());
        }
        header.insert(name, json!({"dtype": "F32", "shape": shape, "data_offsets": [start, data.len()]}));
    }
    let header = Value::Object(header).to_string().into_bytes();
    let file = [&(header.len() as u64).to_le_bytes()[..], &header, &data].concat();
    fs::write(folder.join("model.safetensors"), file).unwrap();
}

struct Shop {
    model: tempfile::TempDir,
}

impl Shop {
    fn new(format: SftFormat) -> Self {
        let model = tempfile::tempdir().unwrap();
        checkpoint(&model.path().join("m"), format);
        Self { model }
    }

    fn bench(&self, users: usize) -> Bench {
        Bench::new()
            .input_path("checkpoint", self.model.path().join("m"))
            .input("holdout", holdout(users))
            .input("id2meta", id2meta())
    }

    fn run(&self, users: usize, with: Value) -> Ran {
        self.bench(users).run("generate", with).unwrap()
    }
}

fn items(line: &Value) -> Vec<&str> {
    line["items"].as_array().unwrap().iter().map(|i| i.as_str().unwrap()).collect()
}

#[test]
fn every_user_gets_items_that_they_have_not_had() {
    for format in [SftFormat::Compact, SftFormat::Text] {
        let shop = Shop::new(format);
        let ran = shop.run(9, json!({"beams": 10, "top_n": 10, "splits": ["valid", "test"]}));
        let lines = ran.lines("rankings");
        assert_eq!(lines.len(), 18);
        for (line, user) in lines.iter().zip(holdout(9).lines().chain(holdout(9).lines())) {
            let user: Value = serde_json::from_str(user).unwrap();
            assert_eq!((&line["user"], &line["target"]), (&user["user"], &user[line["split"].as_str().unwrap()]));
            assert_eq!(items(line).len(), 10);
            let scores: Vec<f64> = line["scores"].as_array().unwrap().iter().map(|s| s.as_f64().unwrap()).collect();
            assert!(scores.is_sorted_by(|a, b| a >= b));
            for item in items(line) {
                assert!(!user["history"].as_array().unwrap().iter().any(|h| h == item));
                assert!(line["split"] == "valid" || user["valid"] != item);
            }
        }
        assert_eq!((&lines[0]["split"], &lines[9]["split"]), (&json!("valid"), &json!("test")));
    }
}

#[test]
fn items_of_one_tid_stand_side_by_side_and_the_more_frequent_first() {
    let shop = Shop::new(SftFormat::Compact);
    let ran = shop.run(9, json!({"beams": 40, "top_n": 40, "exclude_seen": false}));
    let often = holdout(9).matches("\"i39\"").count() > holdout(9).matches("\"i38\"").count();
    for line in ran.lines("rankings") {
        assert_eq!(items(&line).len(), 40);
        let place = |id: &str| items(&line).iter().position(|i| *i == id).unwrap();
        assert_eq!(place("i38").abs_diff(place("i39")), 1);
        assert_eq!(place("i39") < place("i38"), often);
    }
}

#[test]
fn enough_beams_and_exact_scores_give_one_list() {
    let shop = Shop::new(SftFormat::Text);
    for normalize in ["full", "allowed"] {
        let with = |decoding: &str| json!({"decoding": decoding, "normalize": normalize, "beams": 40});
        let (beams, exact) = (shop.run(4, with("catalogue")), shop.run(4, with("exact")));
        for (a, b) in beams.lines("rankings").iter().zip(&exact.lines("rankings")) {
            assert_eq!(items(a), items(b));
        }
    }
}

#[test]
fn exact_lists_are_as_long_as_asked() {
    let shop = Shop::new(SftFormat::Text);
    let ran = shop.run(2, json!({"decoding": "exact", "beams": 3, "top_n": 30, "exclude_seen": false}));
    assert!(ran.lines("rankings").iter().all(|line| items(line).len() == 30));
}

#[test]
fn titles_tell_items_of_one_tid_apart() {
    let shop = Shop::new(SftFormat::Text);
    let ran = shop.run(3, json!({"score": "sequence", "beams": 40, "top_n": 40, "exclude_seen": false}));
    for line in ran.lines("rankings") {
        let place = |id: &str| items(&line).iter().position(|i| *i == id).unwrap();
        assert_ne!(line["scores"][place("i38")], line["scores"][place("i39")]);
    }
}

#[test]
fn results_do_not_depend_on_threads() {
    let shop = Shop::new(SftFormat::Text);
    let run = |threads| shop.bench(40).threads(threads).run("generate", json!({"beams": 5})).unwrap().text("rankings");
    assert_eq!(run(1), run(3));
}

#[test]
fn free_decoding_keeps_the_texts() {
    let shop = Shop::new(SftFormat::Text);
    for compat in ["fixed", "reference"] {
        let with = json!({"decoding": "free", "beams": 4, "max_new_tokens": 12, "compat": compat});
        for line in shop.run(3, with).lines("rankings") {
            assert_eq!(line["texts"].as_array().unwrap().len(), 4);
        }
    }
    let compact = Shop::new(SftFormat::Compact);
    let ran = compact.run(9, json!({"decoding": "free", "beams": 20, "max_new_tokens": 5, "exclude_seen": false}));
    let hits: usize = ran.lines("rankings").iter().map(|l| items(l).len()).sum();
    // Five words out of eight: some beam of nine users writes an item by chance.
    assert!(ran.lines("rankings").iter().all(|l| l["texts"][0].as_str().unwrap().split(' ').count() == 5));
    assert!(hits < 9 * 20);
    let error = compact.bench(2).run("generate", json!({"decoding": "free", "compat": "reference"}));
    refuses(error, &["compact"]);
}

#[test]
fn texts_without_a_tid_are_told_with_what_the_model_wrote() {
    let free = |beams: usize| json!({"decoding": "free", "beams": beams, "max_new_tokens": 5, "exclude_seen": false});
    let ran = Shop::new(SftFormat::Text).run(3, free(2));
    let best = ran.lines("rankings")[0]["texts"][0].as_str().unwrap().to_owned();
    let told = ran.logs().into_iter().find(|line| line.starts_with("none of 6 texts holds a TID")).unwrap().to_owned();
    let wrote = format!("for user `u0` the model wrote {best:?}: ");
    assert!(told.contains(&wrote) && told.contains("`decoding: catalogue`"), "{told}");
    assert!(!ran.logs().iter().any(|line| line.contains("lists are shorter")), "told once: {:?}", ran.logs());
    let catalogue = Shop::new(SftFormat::Compact).run(3, json!({}));
    assert!(!catalogue.logs().iter().any(|line| line.contains("texts")));
}

#[test]
fn texts_with_a_tid_are_counted() {
    let free = json!({"decoding": "free", "beams": 40, "max_new_tokens": 5, "exclude_seen": false});
    let texts = |ran: &Ran| -> Vec<String> {
        let of_user = |line: &Value| line["texts"].as_array().unwrap().clone();
        ran.lines("rankings").iter().flat_map(of_user).map(|text| text.as_str().unwrap().to_owned()).collect()
    };
    let shop = Shop::new(SftFormat::Compact);
    let written = texts(&shop.run(9, free.clone()));
    assert_eq!(written.len(), 360);
    // What the model writes does not depend on the catalogue: an item by one of its texts, which nobody had, is found.
    let one = written.iter().find(|text| !text.contains("<unk>")).unwrap();
    let mut catalogue: Value = serde_json::from_str(&id2meta()).unwrap();
    let tid: Vec<&str> = one.split(' ').collect();
    catalogue["new"] = json!({"id": "new", "title": "New", "summary_words": tid});
    let ran = shop.bench(9).input("id2meta", catalogue.to_string()).run("generate", free).unwrap();
    assert_eq!(texts(&ran), written);
    let is_tid = |text: &&String| *text == one || (0..40).any(|n| words(n).join(" ") == **text);
    let valid = written.iter().filter(is_tid).count();
    assert!(valid > 0);
    let told = format!("{valid} of 360 texts hold a TID of the catalogue");
    assert!(ran.logs().contains(&told.as_str()), "{told}: {:?}", ran.logs());
    assert!(ran.lines("rankings").iter().any(|line| items(line).contains(&"new")));
    assert!(ran.logs().iter().any(|line| line.contains("lists are shorter than 20")), "{:?}", ran.logs());
}

#[test]
fn one_more_user_costs_one_user_and_a_longer_list_none() {
    let shop = Shop::new(SftFormat::Compact);
    let memo = MemoryMemo::default();
    let run = |users: usize, with: Value| {
        let folder = tempfile::tempdir().unwrap();
        let put = |name: &str, text: String| {
            fs::write(folder.path().join(name), text).unwrap();
            (name.to_owned(), folder.path().join(name))
        };
        let inputs = BTreeMap::from([
            ("checkpoint".to_owned(), shop.model.path().join("m")),
            put("holdout", holdout(users)),
            put("id2meta", id2meta()),
        ]);
        let outputs = BTreeMap::from([("rankings".to_owned(), folder.path().join("out.jsonl"))]);
        let scratch = folder.path().join("scratch");
        let before = memo.appended();
        let mut cx = StageContext::new(inputs, outputs, scratch, 1, Vec::new(), StopFlag::default(), |_| {})
            .with_rows(memo.clone());
        let kind = crate::kind("generate").unwrap();
        kind.run(&kind.resolve_params(&with).unwrap(), &mut cx).unwrap();
        (memo.appended() - before, fs::read_to_string(folder.path().join("out.jsonl")).unwrap())
    };
    let (computed, first) = run(12, json!({}));
    assert_eq!(computed, 12);
    let (computed, second) = run(13, json!({}));
    assert_eq!(computed, 1);
    assert!(second.starts_with(&first));
    assert_eq!(run(13, json!({"top_n": 7})).0, 0);
    assert_eq!(run(13, json!({"beams": 7})).0, 13);
}

#[test]
fn what_does_not_fit_together_is_refused() {
    let shop = Shop::new(SftFormat::Compact);
    let other = r#"{"user": "u", "history": ["zz"], "valid": "i1", "test": "i2"}"#;
    refuses(shop.bench(1).input("holdout", other).run("generate", json!({})), &["`zz`", "id2meta"]);
    refuses(shop.bench(1).input("holdout", "").run("generate", json!({})), &["no users"]);
    let blank = r#"{"i": {"id": "i", "summary_words": ["", "", "", "", ""]}}"#;
    refuses(shop.bench(1).input("id2meta", blank).run("generate", json!({})), &["no item can be recommended"]);
    let encoder = concat!(env!("CARGO_MANIFEST_DIR"), "/nn/tests/fixtures/encoders/bert");
    let encoder = shop.bench(1).input_path("checkpoint", encoder).run("generate", json!({}));
    refuses(encoder, &["bert/config.json: `bert` is an encoder, and writes no text", "Qwen3"]);
    let weights = shop.model.path().join("m/model.safetensors");
    let bytes = fs::read(&weights).unwrap();
    fs::write(&weights, &bytes[..bytes.len() / 2]).unwrap();
    refuses(shop.bench(2).run("generate", json!({})), &["not a whole safetensors file"]);
    let text = Shop::new(SftFormat::Text);
    let model = text.model.path().join("m");
    let config = fs::read_to_string(model.join("config.json")).unwrap();
    fs::write(
        model.join("config.json"),
        config.replace("\"max_position_embeddings\":512", "\"max_position_embeddings\":20"),
    )
    .unwrap();
    let long = text.bench(4).run("generate", json!({"compat": "reference"}));
    refuses(long, &["4 of 4 prompts are longer than the model's 20 positions; that of user `u3` has", "`max_items`"]);
    let info = fs::read_to_string(model.join("grlm.json")).unwrap();
    fs::write(model.join("grlm.json"), info.replace("\"max_length\": 400", "\"max_length\": 9")).unwrap();
    refuses(text.bench(1).run("generate", json!({})), &["user `u0`: the last item of a history", "`max_length`"]);
    let issues = Generate::check(&Params { beams: 0, splits: Vec::new(), ..Params::default() });
    assert_eq!(issues.iter().map(|i| i.path.as_str()).collect::<Vec<_>>(), ["beams", "splits"]);
    let both = Params { decoding: Decoding::Free, normalize: Normalize::Allowed, ..Params::default() };
    assert_eq!(Generate::check(&both)[0].path, "normalize");
}
