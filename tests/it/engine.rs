//! An encoder and a language model through the real program, on the catalogue of Industrial: what a changed title costs,
//! and that a killed run goes on.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::Stdio,
};

use serde_json::{Value, json};

use crate::environment::{Environment, Running, unwrapped};

const ITEMS: usize = 48;
/// Neighbours in a prompt.
const SHOWN: usize = 3;
const CHANGED: &str = "Lavender soap dish, hand made";

const PIPELINE: &str = r#"
name: engine
stages:
  similarity:
    uses: similarity
    inputs: { items: { file: items.json } }
    with: { encoder: { model: ./model, max_tokens: 64 }, top_k: 5 }
  tid:
    uses: tid
    inputs: { items: { file: items.json }, neighbors: similarity.neighbors }
    with:
      extractor: { model: ./model, max_new_tokens: 8, max_attempts: 1 }
      neighbors: 3
      resolve_collisions: false
"#;

/// The first items of the published catalogue, one title changed if asked for.
fn items(data: &Path, changed: Option<usize>) -> String {
    let text = fs::read_to_string(data.join("data/industrial/industrial.item.json")).unwrap();
    let all: serde_json::Map<String, Value> = serde_json::from_str(&text).unwrap();
    let mut some: serde_json::Map<String, Value> = all.into_iter().take(ITEMS).collect();
    if let Some((_, item)) = changed.and_then(|which| some.iter_mut().nth(which)) {
        item["title"] = json!(CHANGED);
    }
    Value::Object(some).to_string()
}

/// The tiny random Qwen3 that the encoders' tests have, with room for whole prompts.
fn model(folder: &Path) {
    let from = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("stages/nn/tests/fixtures/encoders/qwen3");
    fs::create_dir_all(folder).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, folder.join(path.file_name().unwrap())).unwrap();
    }
    let config = folder.join("config.json");
    let mut value: Value = serde_json::from_slice(&fs::read(&config).unwrap()).unwrap();
    value["max_position_embeddings"] = json!(4096);
    fs::write(config, value.to_string()).unwrap();
}

fn environment(data: &Path) -> Environment {
    let env = Environment::new();
    env.write("engine.yaml", PIPELINE);
    env.write("items.json", &items(data, None));
    model(&env.path("model"));
    env
}

fn data() -> Option<PathBuf> {
    let path = std::env::var_os("GRLM_TEST_DATA").map(PathBuf::from);
    if path.is_none() {
        eprintln!("skipped: GRLM_TEST_DATA is not set");
    }
    path
}

/// How many rows `plan` says are missing of a stage, and of how many; `None` where that is not known yet, or it is done.
fn missing(env: &Environment, stage: &str) -> Option<(u64, u64)> {
    let plan: Value = serde_json::from_str(&env.ok(&["plan", "engine.yaml", "--json"]).stdout).unwrap();
    let rows = &plan.as_array().unwrap().iter().find(|line| line["stage"] == stage)?["rows"];
    Some((rows["missing"].as_u64()?, rows["total"].as_u64()?))
}

fn title(env: &Environment, id: &str) -> String {
    let items: Value = serde_json::from_str(&env.read("items.json")).unwrap();
    items[id]["title"].as_str().unwrap_or_default().to_owned()
}

/// The neighbours that each item's prompt shows.
fn neighbors_shown(env: &Environment) -> BTreeMap<String, Vec<String>> {
    let one = |line: &str| {
        let line: Value = serde_json::from_str(line).unwrap();
        let id = |of: &Value| of["id"].as_str().unwrap().to_owned();
        (id(&line), line["neighbors"].as_array().unwrap().iter().take(SHOWN).map(id).collect())
    };
    env.read("out/engine/similarity/neighbors.jsonl").lines().map(one).collect()
}

/// Runs until so many rows of `tid` are done, then kills; returns how many were done.
fn killed_at(env: &Environment, rows: u64) -> u64 {
    let arguments = ["run", "engine.yaml", "--message-format", "json"];
    let mut run = Running::start(env.command(&arguments).stdout(Stdio::piped()).stderr(Stdio::null()));
    let mut done = 0;
    for line in BufReader::new(run.stdout.take().unwrap()).lines() {
        let event: Value = serde_json::from_str(&line.unwrap()).unwrap();
        if event["stage"] == "tid" && event["kind"] == "progress" {
            done = event["done"].as_u64().unwrap();
            if done >= rows {
                break;
            }
        }
    }
    run.kill().unwrap();
    run.wait().unwrap();
    done
}

#[test]
fn a_changed_title_costs_one_embedding_and_a_killed_run_goes_on() {
    let Some(data) = data() else { return };
    let undisturbed = environment(&data);
    undisturbed.ok(&["run", "engine.yaml"]);

    let env = environment(&data);
    let done = killed_at(&env, ITEMS as u64 * 6 / 10);
    assert!((1..=ITEMS as u64).contains(&done), "{done}");
    // `None` only where the run was over before it could be killed.
    if let Some((left, all)) = missing(&env, "tid") {
        assert!(left + done <= all, "{left} of {all} are missing, though {done} were said to be done");
    }
    env.ok(&["run", "engine.yaml"]);
    for file in ["similarity/neighbors.jsonl", "tid/tids.jsonl", "tid/statistics.json"] {
        assert_eq!(env.read(&format!("out/engine/{file}")), undisturbed.read(&format!("out/engine/{file}")), "{file}");
    }

    let shown = neighbors_shown(&env);
    env.write("items.json", &items(&data, Some(20)));
    let (left, all) = missing(&env, "similarity").expect("rows are foreseen");
    assert!(left == 1 && all > 40, "{left} of {all}");
    let answers = env.computed("engine.yaml", "tid");
    let after = neighbors_shown(&env);
    let id = after.keys().find(|id| title(&env, id) == CHANGED).expect("the changed item");
    let reads_otherwise = |item: &String| item == id || after[item] != shown[item] || after[item].contains(id);
    let wanted = after.keys().filter(|item| reads_otherwise(item)).count() as u64;
    assert_eq!(answers, Some(wanted), "answers to the prompts that changed");
    assert!((1..ITEMS as u64 / 2).contains(&wanted), "{wanted}");
    // And changed back: every row is there.
    env.write("items.json", &items(&data, None));
    assert_eq!(env.computed("engine.yaml", "tid").unwrap_or(0), 0);
    assert_eq!(env.read("out/engine/tid/tids.jsonl"), undisturbed.read("out/engine/tid/tids.jsonl"));
}

#[test]
fn a_model_that_is_not_there_is_found_before_anything_runs() {
    let env = Environment::new();
    env.write("engine.yaml", PIPELINE);
    env.write("items.json", r#"{"1": {"title": "a"}}"#);
    let said = unwrapped(&env.fails(3, &["plan", "engine.yaml"]));
    for part in ["engine.yaml:7:", "engine.yaml:12:", "`./model` is not a folder", "give a model's folder"] {
        assert!(said.contains(part), "{part:?} is not in {said}");
    }
}
