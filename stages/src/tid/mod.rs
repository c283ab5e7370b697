//! Stage `tid`: five words for every item, the term identifier that a recommender will write.
//!
//! The `keywords` extractor needs no model ([`keywords`]); a language model is asked for each item ([`language`]), with
//! the prompt of [`prompt`] and its answers read by [`parse`]. A user's own answers (`overrides`) win over any
//! extractor's. Items without a usable text or answer get no words, and are listed in `invalid` with the reason; they
//! stay in `tids`, so that the statistics count them, and later stages leave them out.

use std::{
    collections::{BTreeMap, HashMap},
    time::Instant,
};

use rustc_hash::{FxHashMap, FxHashSet};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{
    Artifact, Compat, Input, Output, ParamIssue, Ports, Resources, Stage, StageContext, StageError,
    artifact::{Item, ItemId, Neighbor, TID_LENGTH, TidRecord, items, jsonl, neighbors, python_json, tids},
    method::Method,
    model_folder,
    prompts::Prompts,
    rows::RowJob,
    threads,
};

mod collisions;
pub mod keywords;
mod language;
mod overrides;
pub mod parse;
pub mod prompt;
pub mod statistics;

use keywords::{Choice, Keywords};
use language::{Asker, Catalogue, LanguageModel, Spent};
use statistics::Entry;

pub struct Tid;

/// Parameters of `tid`.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Params {
    /// What chooses the words: `keywords`, `{ model: FOLDER, max_attempts, … }`, or
    /// `{ endpoint: URL, model: NAME, … }`.
    pub extractor: Method<Keywords, LanguageModel>,
    /// Neighbours of an item that are shown to a model and compared in the statistics; 0 leaves the context out.
    pub neighbors: usize,
    /// Changes the last words of items that would share a TID: `keywords` as far as their texts hold other words, a
    /// model by asking it for another word (`extractor.collision_rounds`). Not in `compat: reference`, when a model is
    /// asked.
    pub resolve_collisions: bool,
    /// How many items may be left without words because the model had no answer for them.
    pub max_failed_rows: usize,
    /// Which behaviour to follow where the published script is known to be wrong (a model's prompt and answers).
    pub compat: Compat,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            extractor: Method::default(),
            neighbors: 5,
            resolve_collisions: true,
            max_failed_rows: 0,
            compat: Compat::Fixed,
        }
    }
}

impl Stage for Tid {
    const KIND: &'static str = "tid";
    const SUMMARY: &'static str = "five words for every item: its term identifier";
    const FLOATING_POINT: bool = true;
    const SHRINKS: bool = true;
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
        match &params.extractor {
            Method::BuiltIn(_) => Resources::cpus(2),
            Method::Model(model) => model_folder::resources(model.endpoint.is_some()),
        }
    }

    fn models(params: &Params) -> BTreeMap<String, String> {
        match &params.extractor {
            Method::Model(model) if model.endpoint.is_none() => [(language::PLACE.to_owned(), model.name())].into(),
            _ => BTreeMap::new(),
        }
    }

    fn secrets(params: &Params) -> BTreeMap<String, String> {
        match &params.extractor {
            Method::Model(model) => crate::endpoint::secret("extractor", model.api_key_env.as_deref()),
            Method::BuiltIn(_) => BTreeMap::new(),
        }
    }

    fn check(params: &Params) -> Vec<ParamIssue> {
        let mut issues = Vec::new();
        match &params.extractor {
            Method::BuiltIn(keywords) => issues.extend(keywords.check()),
            Method::Model(model) => issues.extend(model.check()),
        }
        if params.neighbors > 1000 {
            issues.push(ParamIssue::new("neighbors", "at most 1000"));
        }
        issues
    }

    fn plan_rows(params: &Params, cx: &mut StageContext) -> Result<Option<RowJob>, StageError> {
        let Method::Model(model) = &params.extractor else { return Ok(None) };
        if model.endpoint.is_none() && cx.model_identity_at_hand(language::PLACE, &model.name())?.is_none() {
            return Ok(None);
        }
        let given = Given::read(params, cx)?;
        let asker = Asker::new(cx, model, params.compat, params.max_failed_rows)?;
        Ok(Some(given.catalogue(params, |catalogue| asker.job(&catalogue.prompts().1))))
    }

    fn run(params: &Params, cx: &mut StageContext) -> Result<(), StageError> {
        let given = Given::read(params, cx)?;
        let (mut found, spent) = match &params.extractor {
            Method::BuiltIn(keywords) => (by_keywords(params, keywords, cx, &given)?, None),
            Method::Model(model) => {
                let (found, spent) = by_model(params, model, cx, &given)?;
                (found, Some(spent))
            }
        };
        for (item, found) in given.items.iter().zip(&mut found) {
            if let Some(words) = given.overrides.get(&item.id) {
                *found = Found::given(words.to_vec());
            }
        }
        write(params, cx, &given, &found, spent)
    }
}

/// The inputs.
struct Given {
    items: Vec<Item>,
    /// The neighbours of each item: those that are shown, and more where the keywords use them.
    near: FxHashMap<ItemId, Vec<Neighbor>>,
    overrides: FxHashMap<ItemId, [String; TID_LENGTH]>,
    prompts: Prompts,
}

impl Given {
    fn read(params: &Params, cx: &StageContext) -> Result<Self, StageError> {
        // A wrong file is an error even where its texts are not needed.
        let prompts = Prompts::load(cx.optional_input("prompts"))?;
        let items = items::read(cx.input("items")?)?;
        let mut near = read_neighbors(cx)?;
        if let Method::Model(_) = params.extractor {
            near.values_mut().for_each(|near| near.truncate(params.neighbors));
        }
        let overrides = match cx.optional_input("overrides") {
            Some(path) => {
                let known: FxHashSet<&ItemId> = items.iter().map(|item| &item.id).collect();
                overrides::read(path, |id| known.contains(id))?
            }
            None => FxHashMap::default(),
        };
        Ok(Self { items, near, overrides, prompts })
    }

    /// Calls `with` with what a model is asked about.
    fn catalogue<R>(&self, params: &Params, with: impl FnOnce(&Catalogue) -> R) -> R {
        with(&Catalogue {
            items: &self.items,
            neighbors: &|id| self.near.get(id).map_or(&[], Vec::as_slice),
            template: &self.prompts.tid_extraction,
            compat: params.compat,
            given: &|id| self.overrides.contains_key(id),
        })
    }

    fn given_tids(&self) -> impl Iterator<Item = Vec<String>> {
        self.overrides.values().map(|words| words.to_vec())
    }
}

/// What an extractor found for an item.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Found {
    words: Vec<String>,
    /// The answer that the words are from.
    output: String,
    /// Why the words are no TID.
    problem: Option<String>,
}

impl Found {
    fn given(words: Vec<String>) -> Self {
        Self { output: format!("[{}]", words.join(", ")), words, problem: None }
    }
}

fn by_keywords(
    params: &Params,
    keywords: &Keywords,
    cx: &mut StageContext,
    given: &Given,
) -> Result<Vec<Found>, StageError> {
    let items = &given.items;
    let places: HashMap<&ItemId, usize> = items.iter().enumerate().map(|(i, item)| (&item.id, i)).collect();
    let width = if params.neighbors == 0 { 0 } else { keywords.context };
    let context: Vec<Vec<(usize, f32)>> = items
        .iter()
        .map(|item| {
            let near = given.near.get(&item.id).into_iter().flatten().filter(|n| n.id != item.id).take(width);
            near.filter_map(|n| Some((*places.get(&n.id)?, n.score as f32))).collect()
        })
        .collect();
    let mut choices = threads::pool(cx)?.install(|| keywords.extract(items, &context));
    for (item, choice) in items.iter().zip(&mut choices) {
        if given.overrides.contains_key(&item.id) {
            *choice = Choice::default();
        }
    }
    if params.resolve_collisions {
        let left = collisions::resolve(&mut choices, given.given_tids());
        if left > 0 {
            cx.info(format!("{left} items share their TID with another: their texts hold no other words"));
        }
    }
    let found = choices.into_iter().map(|Choice { words, .. }| match words.len() {
        TID_LENGTH => Found::given(words),
        0 => Found { problem: Some("no usable text".into()), ..Found::default() },
        _ => Found { words, output: String::new(), problem: Some("too few different words".into()) },
    });
    Ok(found.collect())
}

fn by_model(
    params: &Params,
    model: &LanguageModel,
    cx: &mut StageContext,
    given: &Given,
) -> Result<(Vec<Found>, Spent), StageError> {
    let start = Instant::now();
    let mut asker = Asker::new(cx, model, params.compat, params.max_failed_rows)?;
    let (found, spent) = given.catalogue(params, |catalogue| {
        let (mut found, mut spent) = language::extract(cx, &mut asker, catalogue)?;
        if params.resolve_collisions && !params.compat.is_reference() {
            let (taken, rounds) = (given.given_tids(), model.collision_rounds);
            let left = language::distinguish(cx, &mut asker, catalogue, &mut found, taken, &mut spent, rounds)?;
            if left > 0 {
                let why = "the model had no other word for them, or no answer";
                cx.info(format!("{left} items share their TID with another: {why}"));
            }
        }
        Ok::<_, StageError>((found, spent))
    })?;
    let (seconds, now) = (start.elapsed().as_secs_f64(), asker.tally());
    cx.info(format!(
        "{} questions asked in {seconds:.1} s, {} prompt and {} answer tokens; {} answers were known",
        now.answers, now.prompt_tokens, now.answer_tokens, now.known
    ));
    // Of this run alone, and so not in the statistics: they are the same whenever the same answers come.
    cx.metric("seconds", seconds, None);
    cx.metric("prompt_tokens", now.prompt_tokens as f64, None);
    cx.metric("answer_tokens", now.answer_tokens as f64, None);
    Ok((found, spent))
}

/// The neighbours of each item.
fn read_neighbors(cx: &StageContext) -> Result<FxHashMap<ItemId, Vec<Neighbor>>, StageError> {
    let Some(path) = cx.optional_input("neighbors") else { return Ok(FxHashMap::default()) };
    let all = neighbors::read(path)?;
    Ok(all.into_iter().map(|of| (of.id, of.neighbors)).collect())
}

fn write(
    params: &Params,
    cx: &mut StageContext,
    given: &Given,
    found: &[Found],
    spent: Option<Spent>,
) -> Result<(), StageError> {
    let (items, compat) = (&given.items, params.compat);
    // What the published script writes of an answer without five words stays: blanks and all.
    let as_told = compat.is_reference() && spent.is_some();
    let near = |id: &ItemId| given.near.get(id).into_iter().flatten().take(params.neighbors);
    let mut invalid = jsonl::Writer::create(cx.output("invalid")?)?;
    let mut records: Vec<TidRecord> = Vec::with_capacity(items.len());
    let mut entries: Vec<Entry> = Vec::with_capacity(items.len());
    let mut unusable = 0;
    let mut example = None;
    for (item, found) in items.iter().zip(found) {
        let valid = found.problem.is_none();
        if let Some(reason) = &found.problem {
            unusable += 1;
            example.get_or_insert_with(|| format!("`{}`: {reason}", item.id));
            let mut line = json!({"id": item.id, "reason": reason, "words": found.words});
            if !found.output.is_empty() {
                line["answer"] = json!(found.output);
            }
            invalid.write(&line)?;
        }
        let words: &[String] = if valid || as_told { &found.words } else { &[] };
        let similar: Vec<&ItemId> = near(&item.id).map(|n| &n.id).collect();
        let Value::Object(mut record) = item.to_value() else {
            return Err(StageError::bug("an item is not an object"));
        };
        record.insert("llm_output".into(), json!(if valid || as_told { found.output.as_str() } else { "" }));
        record.insert("summary_words".into(), json!(words));
        record.insert("similar_item_ids".into(), json!(similar));
        records.push(TidRecord::new(item.id.clone(), record.into()).map_err(StageError::bug)?);
        entries.push(Entry { id: &item.id, words: words.iter().map(String::as_str).collect() });
    }
    invalid.finish()?;
    if unusable > 0 {
        cx.warn(format!(
            "{unusable} of {} items have no TID ({}): the output `invalid` lists them; a longer text or the input \
             `overrides` gives them one",
            items.len(),
            example.unwrap_or_default()
        ));
    }
    tids::write(cx.output("tids")?, &records)?;

    let by_id: FxHashMap<&ItemId, &[Neighbor]> =
        given.near.iter().map(|(id, near)| (id, &near[..near.len().min(params.neighbors)])).collect();
    let mut report = statistics::statistics(&entries, &by_id);
    let summary = statistics::summary(&entries);
    if let Some(rate) = summary["collision_rate"].as_f64() {
        cx.metric("collision_rate", rate, None);
    }
    if !compat.is_reference() {
        report["summary"] = summary;
        if let Some(spent) = spent {
            report["extraction"] = json!({
                "answers": spent.answers,
                "asked_again": spent.asked_again,
                "prompt_tokens": spent.prompt_tokens,
                "answer_tokens": spent.answer_tokens,
            });
        }
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
    fn items_without_words_do_not_count_as_sharing_them() {
        let items = format!("{ITEMS}{{\"id\":\"6\",\"title\":\"?\"}}\n");
        let ran = run("tid", json!({}), &[("items", &items)]).unwrap();
        let statistics = ran.json("statistics");
        assert_eq!(statistics["conflict_analysis"]["total_conflicts"], 1, "as the published script counts");
        assert_eq!(statistics["summary"]["collision_rate"], 0.0);
        assert_eq!(ran.metric("collision_rate"), Some(0.0));
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
    fn bad_input_is_refused() {
        refuses(run("tid", json!({}), &[("items", ITEMS), ("neighbors", "{\"1\": [{")]), &["input-neighbors:1"]);
        refuses(run("tid", json!({}), &[("items", ITEMS), ("prompts", r#"{"tid": ""}"#)]), &["prompts", "tid"]);
        let list = run("tid", json!({}), &[("items", ITEMS), ("prompts", "[]")]);
        refuses(list, &["input-prompts: a list instead of an object of texts", "`tid_extraction`", "docs/data.md"]);
        refuses(run("tid", json!({}), &[("items", &ITEMS[..90])]), &["input-items:2"]);
        let with = json!({"extractor": {"model": "m", "max_attempts": 0, "collision_rounds": 0}, "neighbors": 5000});
        let issues = crate::kind("tid").unwrap().resolve_params(&with).unwrap_err();
        let paths: Vec<String> = issues.into_iter().map(|i| i.path).collect();
        assert_eq!(paths, ["extractor.max_attempts", "extractor.collision_rounds", "neighbors"]);
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
