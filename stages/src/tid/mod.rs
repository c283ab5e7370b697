//! Stage `tid`: five words for every item, the term identifier that a recommender will write.
//!
//! The `keywords` extractor needs no model ([`keywords`]); a model's prompt and the reading of its answers are in
//! [`prompt`] and [`parse`], running it is the inference engine's business. A user's own answers (`overrides`) win
//! over any extractor's. Items without a usable text get no words, and are listed in `invalid` with the reason; they
//! stay in `tids`, so that the statistics count them, and later stages leave them out.

use std::collections::HashMap;

use rustc_hash::FxHashMap;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::{
    Artifact, Compat, Input, Output, ParamIssue, Ports, Resources, Stage, StageContext, StageError,
    artifact::{Item, ItemId, Neighbor, TID_LENGTH, items, jsonl, neighbors, python_json, tids},
    method::Method,
    prompts::Prompts,
    similarity::Dtype,
    threads,
};

mod collisions;
pub mod keywords;
mod overrides;
pub mod parse;
pub mod prompt;
pub mod statistics;

use keywords::{Choice, Keywords};
use statistics::Entry;

pub struct Tid;

/// A language model that is asked for each item's words.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LanguageModel {
    /// A repository on the Hugging Face hub, or a folder.
    pub model: String,
    /// The revision of the repository.
    #[serde(default)]
    pub revision: Option<String>,
    /// The type that weights and arithmetic have.
    #[serde(default)]
    pub dtype: Dtype,
    /// Longest answer, in tokens.
    #[serde(default = "max_new_tokens")]
    pub max_new_tokens: u32,
    /// How often an item is asked for before its answer counts as invalid.
    #[serde(default = "max_attempts")]
    pub max_attempts: u32,
}

fn max_new_tokens() -> u32 {
    50
}

fn max_attempts() -> u32 {
    3
}

/// Parameters of `tid`.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Params {
    /// What chooses the words: `keywords`, or `{ model: NAME, dtype, max_new_tokens, max_attempts }`.
    pub extractor: Method<Keywords, LanguageModel>,
    /// Neighbours of an item that are shown to a model and compared in the statistics; 0 leaves the context out.
    pub neighbors: usize,
    /// Changes the last words of items that would share a TID, as far as their texts hold other words.
    pub resolve_collisions: bool,
    /// Which behaviour to follow where the published script is known to be wrong (a model's prompt and answers).
    pub compat: Compat,
}

impl Default for Params {
    fn default() -> Self {
        Self { extractor: Method::default(), neighbors: 5, resolve_collisions: true, compat: Compat::Fixed }
    }
}

impl Stage for Tid {
    const KIND: &'static str = "tid";
    const SUMMARY: &'static str = "five words for every item: its term identifier";
    type Params = Params;

    fn ports(_: &Params) -> Ports {
        Ports::new(
            [
                Input::required("items", Artifact::Items, "the catalogue"),
                Input::optional("neighbors", Artifact::Neighbors, "similar items, whose vocabulary is shared"),
                Input::optional("overrides", Artifact::Json, "the user's own answers: item id → five words"),
                Input::optional("prompts", Artifact::Prompts, "the texts that a model is asked with"),
            ],
            [
                Output::new("tids", Artifact::Tids, "tids.jsonl", "the items with their words"),
                Output::new("statistics", Artifact::Json, "statistics.json", "words, collisions and validity"),
                Output::new("invalid", Artifact::JsonLines, "invalid.jsonl", "items without five words, and why")
                    .may_be_empty(),
            ],
        )
    }

    fn resources(params: &Params) -> Resources {
        match params.extractor {
            Method::BuiltIn(_) => Resources::cpus(2),
            Method::Model(_) => Resources { gpus: 1, ..Resources::default() },
        }
    }

    fn check(params: &Params) -> Vec<ParamIssue> {
        let mut issues = Vec::new();
        match &params.extractor {
            Method::BuiltIn(keywords) => issues.extend(keywords.check()),
            Method::Model(model) => {
                if model.model.trim().is_empty() {
                    issues.push(ParamIssue::new("extractor.model", "the model has no name"));
                }
                if model.max_attempts == 0 {
                    issues.push(ParamIssue::new("extractor.max_attempts", "must be at least 1"));
                }
                if model.max_new_tokens == 0 {
                    issues.push(ParamIssue::new("extractor.max_new_tokens", "must be at least 1"));
                }
            }
        }
        if params.neighbors > 1000 {
            issues.push(ParamIssue::new("neighbors", "at most 1000"));
        }
        issues
    }

    fn run(params: &Params, cx: &mut StageContext) -> Result<(), StageError> {
        let keywords = match &params.extractor {
            Method::BuiltIn(keywords) => keywords,
            Method::Model(model) => {
                return Err(StageError::params(format!("this build cannot run the extractor `{}`", model.model))
                    .help("set `extractor: keywords`, which needs no model, or import TIDs with `import_tids`"));
            }
        };
        // A wrong file is an error even where its texts are not needed.
        Prompts::load(cx.optional_input("prompts"))?;
        let items = items::read(cx.input("items")?)?;
        let places: HashMap<&ItemId, usize> = items.iter().enumerate().map(|(i, item)| (&item.id, i)).collect();
        let mut near = read_neighbors(cx)?;
        let overrides = match cx.optional_input("overrides") {
            Some(path) => overrides::read(path, |id| places.contains_key(id))?,
            None => FxHashMap::default(),
        };
        let width = if params.neighbors == 0 { 0 } else { keywords.context };
        let context: Vec<Vec<(usize, f32)>> = items
            .iter()
            .map(|item| {
                let near = near.get(&item.id).into_iter().flatten().filter(|n| n.id != item.id).take(width);
                near.filter_map(|n| Some((*places.get(&n.id)?, n.score as f32))).collect()
            })
            .collect();

        let mut choices = threads::pool(cx)?.install(|| keywords.extract(&items, &context));
        for (item, choice) in items.iter().zip(&mut choices) {
            if overrides.contains_key(&item.id) {
                *choice = Choice::default();
            }
        }
        if params.resolve_collisions {
            let given = overrides.values().map(|words| words.to_vec());
            let left = collisions::resolve(&mut choices, given);
            if left > 0 {
                cx.info(format!("{left} items share their TID with another: their texts hold no other words"));
            }
        }
        for (item, choice) in items.iter().zip(&mut choices) {
            if let Some(words) = overrides.get(&item.id) {
                choice.words = words.to_vec();
            }
        }
        near.values_mut().for_each(|near| near.truncate(params.neighbors));
        write(cx, &items, &near, &choices)
    }
}

/// The neighbours of each item.
fn read_neighbors(cx: &StageContext) -> Result<FxHashMap<ItemId, Vec<Neighbor>>, StageError> {
    let Some(path) = cx.optional_input("neighbors") else { return Ok(FxHashMap::default()) };
    let all = neighbors::read(path)?;
    Ok(all.into_iter().map(|of| (of.id, of.neighbors)).collect())
}

fn write(
    cx: &mut StageContext,
    items: &[Item],
    near: &FxHashMap<ItemId, Vec<Neighbor>>,
    choices: &[Choice],
) -> Result<(), StageError> {
    let mut invalid = jsonl::Writer::create(cx.output("invalid")?)?;
    let mut records: Vec<Map<String, Value>> = Vec::with_capacity(items.len());
    let mut unusable = 0;
    for (item, choice) in items.iter().zip(choices) {
        let valid = choice.words.len() == TID_LENGTH;
        if !valid {
            unusable += 1;
            let reason = if choice.words.is_empty() { "no usable text" } else { "too few different words" };
            invalid.write(&json!({"id": item.id, "reason": reason, "words": choice.words}))?;
        }
        let words: &[String] = if valid { &choice.words } else { &[] };
        let similar: Vec<&ItemId> = near.get(&item.id).into_iter().flatten().map(|n| &n.id).collect();
        let Value::Object(mut record) = item.to_value() else {
            return Err(StageError::bug("an item is not an object"));
        };
        record
            .insert("llm_output".into(), json!(if valid { format!("[{}]", words.join(", ")) } else { String::new() }));
        record.insert("summary_words".into(), json!(words));
        record.insert("similar_item_ids".into(), json!(similar));
        records.push(record);
    }
    invalid.finish()?;
    if unusable > 0 {
        cx.warn(format!(
            "{unusable} of {} items have no TID: see `invalid`; `overrides` can give them one",
            items.len()
        ));
    }
    tids::write(cx.output("tids")?, &records)?;

    let entries: Vec<Entry> = items
        .iter()
        .zip(choices)
        .map(|(item, choice)| Entry {
            id: &item.id,
            words: if choice.words.len() == TID_LENGTH {
                choice.words.iter().map(String::as_str).collect()
            } else {
                Vec::new()
            },
        })
        .collect();
    let by_id: FxHashMap<&ItemId, &[Neighbor]> = near.iter().map(|(id, near)| (id, near.as_slice())).collect();
    let report = statistics::statistics(&entries, &by_id);
    if let Some(rate) = report["conflict_analysis"]["conflict_rate"].as_f64() {
        cx.metric("collision_rate", rate, None);
    }
    let mut text = Vec::new();
    python_json::write_pretty(&mut text, &report, 0);
    let path = cx.output("statistics")?;
    std::fs::write(path, text).map_err(|e| StageError::io("write", path, e))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use crate::{
        artifact::TID_LENGTH,
        testing::{Ran, refuses, run, run_on, shared_data},
    };

    const ITEMS: &str = r#"{"id":"1","title":"Gorilla duct tape silver strong","x":[1]}
{"id":"2","title":"Scotch duct tape silver strong"}
{"id":"3","title":"Scotch duct tape silver strong weatherproof outdoor"}
{"id":"4","title":"Steel bolt, 12 mm, zinc"}
{"id":"5","title":"...","description":""}
"#;
    const NEIGHBORS: &str =
        r#"{"1": [{"item_id": "2", "similarity": 0.9}, {"item_id": "9", "similarity": 0.1}], "4": []}"#;

    fn words(ran: &Ran, line: usize) -> Vec<String> {
        serde_json::from_value(ran.lines("tids")[line]["summary_words"].clone()).unwrap()
    }

    #[test]
    fn five_words_for_every_item_with_text() {
        let ran = run("tid", json!({}), &[("items", ITEMS), ("neighbors", NEIGHBORS)]).unwrap();
        let lines = ran.lines("tids");
        let keys: Vec<&str> = lines[0].as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(keys, ["id", "title", "x", "llm_output", "summary_words", "similar_item_ids"]);
        assert_eq!(lines[0]["similar_item_ids"], json!(["2", "9"]));
        assert_eq!(lines[0]["llm_output"], json!(format!("[{}]", words(&ran, 0).join(", "))));
        for line in 0..4 {
            let words = words(&ran, line);
            assert_eq!(words.len(), TID_LENGTH, "{words:?}");
            assert!(words.iter().all(|w| !w.is_empty() && !w.contains([' ', ',', '[', ']'])), "{words:?}");
        }
        assert_ne!(words(&ran, 1), words(&ran, 2));
        assert_eq!(ran.lines("invalid"), [json!({"id": "5", "reason": "no usable text", "words": []})]);
        assert_eq!(lines[4]["summary_words"], json!([]));
        assert_eq!(ran.json("statistics")["validity_analysis"]["valid_items"], 4);
    }

    #[test]
    fn overrides_win_and_keep_their_words() {
        let overrides = r#"{"5": ["a", "b", "c", "d", "e"], "1": "tape, silver, big, strong, gorilla"}"#;
        let ran = run("tid", json!({}), &[("items", ITEMS), ("overrides", overrides)]).unwrap();
        assert_eq!(words(&ran, 0).join(" "), "tape silver big strong gorilla");
        assert_eq!(words(&ran, 4).join(" "), "a b c d e");
        assert!(ran.text("invalid").is_empty());
        let wrong = r#"{"77": ["a", "b", "c", "d", "e"], "1": ["a"]}"#;
        refuses(run("tid", json!({}), &[("items", ITEMS), ("overrides", wrong)]), &["`77`", "`1`: 1 words"]);
    }

    #[test]
    fn a_model_plans_but_does_not_run() {
        let with = json!({"extractor": {"model": "Qwen/Qwen3-4B-Instruct-2507"}, "neighbors": 0});
        let stage = crate::kind("tid").unwrap();
        assert_eq!(stage.resources(&stage.resolve_params(&with).unwrap()).unwrap().gpus, 1);
        refuses(run("tid", with, &[("items", ITEMS)]), &["Qwen3-4B", "extractor: keywords"]);
        let with = json!({"extractor": {"model": "m", "max_attempts": 0}, "neighbors": 5000});
        let paths: Vec<String> = stage.resolve_params(&with).unwrap_err().into_iter().map(|i| i.path).collect();
        assert_eq!(paths, ["extractor.max_attempts", "neighbors"]);
    }

    #[test]
    fn bad_input_is_refused() {
        refuses(run("tid", json!({}), &[("items", ITEMS), ("neighbors", "{\"1\": [{")]), &["input-neighbors:1"]);
        refuses(run("tid", json!({}), &[("items", ITEMS), ("prompts", "{}")]), &["prompts"]);
        refuses(run("tid", json!({}), &[("items", &ITEMS[..90])]), &["input-items:2"]);
    }

    #[test]
    fn a_real_catalogue_gets_distinct_words_of_a_shared_vocabulary() {
        let Some(data) = shared_data() else { return };
        let text = std::fs::read_to_string(data.join("data/industrial/industrial.item.json")).unwrap();
        let all: serde_json::Map<String, Value> = serde_json::from_str(&text).unwrap();
        // A part of it: enough to show what counts, and quick.
        let items = Value::Object(all.into_iter().take(1000).collect()).to_string();
        let neighbors = run_on(2, "similarity", json!({}), &[("items", &items)]).unwrap().text("neighbors");
        let on = |threads| run_on(threads, "tid", json!({}), &[("items", &items), ("neighbors", &neighbors)]).unwrap();
        let ran = on(2);
        let report: Value = ran.json("statistics");
        assert!(report["conflict_analysis"]["conflict_rate"].as_f64().unwrap() < 0.02);
        assert!(report["validity_analysis"]["valid_items"].as_u64().unwrap() > 990);
        assert!(report["similarity_analysis"]["avg_shared_words"].as_f64().unwrap() > 1.0);
        assert_eq!(ran.text("tids"), on(1).text("tids"));
    }
}
