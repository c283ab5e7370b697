//! A tiny random model of our own.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};

use super::{SPACE, items};
use crate::{
    Failure,
    rows::MemoryMemo,
    testing::{Bench, refuses},
};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("nn/tests/fixtures/encoders").join(name)
}

/// The tiny random Qwen3 that serves as encoder and, having a chat template, as extractor; with room for real prompts.
fn tiny_model(folder: &Path) -> PathBuf {
    for entry in fs::read_dir(fixture("qwen3")).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, folder.join(path.file_name().unwrap())).unwrap();
    }
    configure(folder, "max_position_embeddings", json!(4096));
    folder.to_owned()
}

fn configure(folder: &Path, name: &str, value: Value) {
    let path = folder.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config[name] = value;
    fs::write(path, config.to_string()).unwrap();
}

fn asking(model: &Path) -> Value {
    json!({"extractor": {"model": model, "max_new_tokens": 6, "max_attempts": 1}, "max_failed_rows": 100})
}

/// However many items may fail: it is no item's failure.
#[test]
fn a_fault_of_the_model_is_one_error_that_names_its_file() {
    let bench = Bench::new().input("items", items(3));
    let refused = |model: &Path, words: &[&str]| refuses(bench.run("tid", asking(model)), words);
    refused(&fixture("bert"), &["bert/config.json: `bert` is an encoder, and writes no text", "`similarity`"]);

    let folder = tempfile::tempdir().unwrap();
    let model = tiny_model(folder.path());
    let template = |text: &str| fs::write(model.join("chat_template.jinja"), text).unwrap();
    template("{{ raise_exception('where is the system prompt') if messages[0].role != 'system' }}");
    let why = "chat_template.jinja: the chat template refuses every conversation: ";
    refused(&model, &[why, "where is the system prompt", "mend the template"]);
    template("{% if messages|length > 9 %}much{% endif %}");
    refused(&model, &["chat_template.jinja: the chat template renders nothing", "mend the template"]);
    template("{{ messages[0].content }}");
    configure(&model, "tie_word_embeddings", json!(false));
    refused(&model, &["the weights have no output head (`lm_head.weight`)", "`similarity`"]);
}

#[test]
fn a_prompt_that_is_too_long_is_its_items_failure_and_that_all_are_is_the_stages() {
    // Its 256 positions have room for none.
    let none = Bench::new().input("items", items(3)).run("tid", asking(&fixture("qwen3")));
    let why = "the model can take none of 3 prompts, not even the shortest: a prompt of ";
    refuses(none, &["qwen3: ", why, "more than the model's 256 positions", "fewer `neighbors`", "`tid_extraction`"]);
    // Not a matter of length.
    let folder = tempfile::tempdir().unwrap();
    let model = tiny_model(folder.path());
    let text = "{{ raise_exception('too chatty') if messages[0].content|length > 99 }}{{ messages[0].content }}";
    fs::write(model.join("chat_template.jinja"), text).unwrap();
    let error = Bench::new().input("items", items(3)).run("tid", asking(&model)).unwrap_err();
    assert!(
        error.to_string().contains("none of 3 prompts, not even the shortest: the chat template refuses"),
        "{error}"
    );
    assert!(error.to_string().contains("too chatty"), "{error}");
    let help = error.help_text().unwrap();
    assert!(help.starts_with("mend the template") && !help.contains("positions"), "{help}");

    let folder = tempfile::tempdir().unwrap();
    let model = tiny_model(folder.path());
    let long = json!({"id": "long", "title": "soap ".repeat(5000)});
    let memo = MemoryMemo::default();
    let bench = Bench::new().input("items", items(3) + &long.to_string()).memo(&memo);
    let mut with = asking(&model);
    with["max_failed_rows"] = json!(0);
    let error = bench.run("tid", with).unwrap_err();
    assert_eq!(error.failure(), Failure::FailedRows);
    assert!(error.to_string().starts_with("1 of 4 items failed; item `long`: a prompt of "), "{error}");
    assert!(
        error.to_string().contains("the model's 4096 positions: show fewer `neighbors`, shorten titles"),
        "{error}"
    );
    assert_eq!(memo.len(SPACE), 3);
}

#[test]
fn a_template_that_takes_no_second_turn_leaves_the_first_answers() {
    let folder = tempfile::tempdir().unwrap();
    let model = tiny_model(folder.path());
    let text = "{{ messages[0].content }}{{ raise_exception('one turn') if messages|length > 1 }}";
    fs::write(model.join("chat_template.jinja"), text).unwrap();
    let mut with = asking(&model);
    with["extractor"]["max_attempts"] = json!(2);
    let ran = Bench::new().input("items", items(3)).run("tid", with).unwrap();
    assert_eq!(ran.lines("tids").len(), 3);
    let told = |line: &&str| line.starts_with("3 of 3 questions failed; questions `0`, `1`, `2`: ");
    assert!(ran.logs().into_iter().any(|line| told(&line) && line.contains("one turn")), "{:?}", ran.logs());
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
