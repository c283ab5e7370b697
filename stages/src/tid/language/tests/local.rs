//! A tiny random model of our own.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::SPACE;
use crate::{rows::MemoryMemo, testing::Bench};

/// The tiny random Qwen3 that serves as encoder and, having a chat template, as extractor; with room for real prompts.
fn tiny_model(folder: &Path) -> PathBuf {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("nn/tests/fixtures/encoders/qwen3");
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, folder.join(path.file_name().unwrap())).unwrap();
    }
    let config = folder.join("config.json");
    let mut value: Value = serde_json::from_slice(&std::fs::read(&config).unwrap()).unwrap();
    value["max_position_embeddings"] = json!(4096);
    std::fs::write(config, value.to_string()).unwrap();
    folder.to_owned()
}

#[test]
fn one_changed_title_costs_one_embedding_and_the_answers_whose_prompts_changed() {
    let folder = tempfile::tempdir().unwrap();
    let model = tiny_model(folder.path());
    let memo = MemoryMemo::default();
    let catalogue = |changed: Option<usize>| -> String {
        let kinds =
            ["olive soap bar", "steel wire brush", "cotton towel blue", "mint shampoo mild", "duct tape silver"];
        let line = |i: usize| {
            let more = if changed == Some(i) { " with lavender" } else { "" };
            format!("{}\n", json!({"id": format!("i{i}"), "title": format!("{} size {}{more}", kinds[i % 5], i / 5)}))
        };
        (0..20).map(line).collect()
    };
    let similarity = |items: &str| {
        let with = json!({"encoder": {"model": model, "max_tokens": 64}, "top_k": 3});
        Bench::new().threads(2).input("items", items).memo(&memo).run("similarity", with).unwrap().text("neighbors")
    };
    let with = |max_attempts: usize| {
        json!({
            "extractor": {"model": model, "max_new_tokens": 6, "max_attempts": max_attempts},
            "neighbors": 3,
            "resolve_collisions": false,
        })
    };
    let tid = |items: &str, neighbors: &str, max_attempts: usize| {
        Bench::new()
            .threads(2)
            .input("items", items)
            .input("neighbors", neighbors)
            .memo(&memo)
            .run("tid", with(max_attempts))
            .unwrap()
    };
    let (before, after) = (catalogue(None), catalogue(Some(7)));
    let near_before = similarity(&before);
    assert_eq!((memo.len("embedding"), memo.appended()), (20, 20));
    let near_after = similarity(&after);
    assert_eq!((memo.len("embedding"), memo.appended()), (21, 21), "one embedding");

    let prompts = |items: &str, neighbors: &str| -> Vec<String> {
        let with: crate::tid::Params =
            serde_json::from_value(json!({"extractor": {"model": "m"}, "neighbors": 3})).unwrap();
        let files = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = files.path().join(name);
            std::fs::write(&path, text).unwrap();
            (name.to_owned(), path)
        };
        let inputs = [write("items", items), write("neighbors", neighbors)].into_iter().collect();
        let (scratch, stop) = (files.path().to_owned(), crate::StopFlag::default());
        let cx = crate::StageContext::new(inputs, Default::default(), scratch, 1, Vec::new(), stop, |_| {});
        let given = crate::tid::Given::read(&with, &cx).unwrap();
        given.catalogue(&with, |c| c.prompts().1.into_iter().map(|m| m[0].content.clone()).collect())
    };
    let (first, second) = (prompts(&before, &near_before), prompts(&after, &near_after));
    let changed = first.iter().zip(&second).filter(|(a, b)| a != b).count();
    assert!((2..20).contains(&changed), "{changed}: its neighbours show the title too");

    let ran = tid(&before, &near_before, 1);
    assert_eq!(memo.len(SPACE), 20);
    let tokens = &ran.json("statistics")["extraction"];
    assert!(tokens["answers"] == 20 && tokens["prompt_tokens"].as_u64().unwrap() > 20 * 300, "{tokens}");
    tid(&after, &near_after, 1);
    assert_eq!(memo.len(SPACE), 20 + changed);

    // On any number of devices and threads, and from nothing, the same bytes.
    let twice = tid(&before, &near_before, 2);
    let elsewhere = Bench::new().devices(3).threads(3).input("items", before).input("neighbors", near_before);
    assert_eq!(elsewhere.run("tid", with(2)).unwrap().text("tids"), twice.text("tids"));
}
