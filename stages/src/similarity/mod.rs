//! Stage `similarity`: for each item of a catalogue, the items whose texts are most alike.
//!
//! `reference`: the published file's layout, and its loss of the nearest neighbour: ranks 2 to `top_k` + 1, where the
//! nearest was taken for the item itself; items that share nothing fill a list up, in catalogue order. `fixed`: ranks
//! 1 to `top_k`, JSON Lines, and only items that share something. Encoding by a model is the inference engine's
//! business; this build has the `tfidf` encoder.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    Artifact, Compat, Input, Output, ParamIssue, Ports, Resources, Stage, StageContext, StageError,
    artifact::{Neighbor, Neighbors, items, jsonl, neighbors},
    method::Method,
    threads,
};

pub mod text;
pub mod tfidf;

use tfidf::Tfidf;

pub struct Similarity;

/// An embedding model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EmbeddingModel {
    /// A repository on the Hugging Face hub, or a folder.
    pub model: String,
    /// The revision of the repository.
    #[serde(default)]
    pub revision: Option<String>,
    /// The type that weights and arithmetic have.
    #[serde(default)]
    pub dtype: Dtype,
    /// How token vectors become one: as the model was trained, unless given; `reference` takes the mean.
    #[serde(default)]
    pub pooling: Option<Pooling>,
    /// Texts are cut to this many tokens.
    #[serde(default = "max_tokens")]
    pub max_tokens: u32,
}

fn max_tokens() -> u32 {
    512
}

/// A floating-point type.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Dtype {
    #[default]
    Bf16,
    F16,
    F32,
}

/// How the vectors of a text's tokens become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Pooling {
    /// The mean over all tokens.
    Mean,
    /// The last token's.
    Last,
    /// The first token's.
    Cls,
}

/// Parameters of `similarity`.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Params {
    /// What makes a vector of an item's text: `tfidf`, or `{ model: NAME, dtype, pooling, max_tokens }`.
    pub encoder: Method<Tfidf, EmbeddingModel>,
    /// Neighbours of each item.
    pub top_k: usize,
    /// Which behaviour to follow where the published script is known to be wrong.
    pub compat: Compat,
}

impl Default for Params {
    fn default() -> Self {
        Self { encoder: Method::default(), top_k: 20, compat: Compat::Fixed }
    }
}

impl Stage for Similarity {
    const KIND: &'static str = "similarity";
    const SUMMARY: &'static str = "the most similar items of each item, by their texts";
    const FLOATING_POINT: bool = true;
    type Params = Params;

    fn ports(params: &Params) -> Ports {
        let file = if params.compat.is_reference() { "similarities.json" } else { "neighbors.jsonl" };
        Ports::new(
            [Input::required("items", Artifact::Items, "the catalogue")],
            [Output::new("neighbors", Artifact::Neighbors, file, "each item's neighbours, best first")],
        )
    }

    fn resources(params: &Params) -> Resources {
        match params.encoder {
            Method::BuiltIn(_) => Resources::cpus(2),
            Method::Model(_) => Resources { gpus: 1, ..Resources::default() },
        }
    }

    fn check(params: &Params) -> Vec<ParamIssue> {
        let mut issues = match &params.encoder {
            Method::BuiltIn(tfidf) => tfidf.check(),
            Method::Model(model) if model.model.trim().is_empty() => {
                vec![ParamIssue::new("encoder.model", "the model has no name")]
            }
            Method::Model(model) if model.max_tokens == 0 => {
                vec![ParamIssue::new("encoder.max_tokens", "must be at least 1")]
            }
            Method::Model(_) => Vec::new(),
        };
        if params.top_k == 0 || params.top_k > 10_000 {
            issues.push(ParamIssue::new("top_k", "must be from 1 to 10000"));
        }
        issues
    }

    fn run(params: &Params, cx: &mut StageContext) -> Result<(), StageError> {
        let tfidf = match &params.encoder {
            Method::BuiltIn(tfidf) => tfidf,
            Method::Model(model) => {
                return Err(StageError::params(format!("this build cannot run the encoder `{}`", model.model)).help(
                    "set `encoder: tfidf`, which needs no model, or import neighbours that were made elsewhere",
                ));
            }
        };
        let items = items::read(cx.input("items")?)?;
        let reference = params.compat.is_reference();
        let wanted = params.top_k + usize::from(reference);
        let mut found = threads::pool(cx)?.install(|| tfidf::top_k(&tfidf.encode(&items), wanted));
        if reference {
            for (own, row) in found.iter_mut().enumerate() {
                fill_up(row, own, wanted.min(items.len() - 1), items.len());
                if !row.is_empty() {
                    row.remove(0);
                }
            }
        }
        let alone = found.iter().filter(|row| row.is_empty()).count();
        if alone > 0 {
            cx.info(format!(
                "{alone} of {} items have no neighbour: their text is missing or unlike any other",
                items.len()
            ));
        }
        let all: Vec<Neighbors> = items
            .iter()
            .zip(found)
            .map(|(item, row)| Neighbors {
                id: item.id.clone(),
                neighbors: row
                    .into_iter()
                    .map(|(i, score)| Neighbor { id: items[i as usize].id.clone(), score: written(score, reference) })
                    .collect(),
            })
            .collect();
        let path = cx.output("neighbors")?;
        if reference { neighbors::write_reference(path, &all) } else { jsonl::write(path, &all) }
    }
}

/// Adds items that share nothing, in catalogue order, until `row` has `wanted`.
fn fill_up(row: &mut Vec<(u32, f32)>, own: usize, wanted: usize, items: usize) {
    let mut next = 0;
    while row.len() < wanted && next < items {
        let index = next as u32;
        if next != own && row.iter().all(|(i, _)| *i != index) {
            row.push((index, 0.0));
        }
        next += 1;
    }
}

/// Six digits are more than the arithmetic is worth; the published file has them all.
fn written(score: f32, reference: bool) -> f64 {
    let score = f64::from(score);
    if reference { score } else { (score * 1e6).round() / 1e6 }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use crate::testing::{refuses, run, run_on, shared_data};

    const ITEMS: &str = r#"{"id":"a","title":"red soap bar"}
{"id":"b","title":"red soap"}
{"id":"c","title":"blue gel"}
{"id":"d","title":"blue gel soap"}
{"id":"e"}
"#;

    fn ids(value: &Value, key: &str) -> Vec<String> {
        value.as_array().unwrap().iter().map(|n| n[key].as_str().unwrap().to_owned()).collect()
    }

    #[test]
    fn fixed_keeps_the_nearest() {
        let ran = run("similarity", json!({"top_k": 2}), &[("items", ITEMS)]).unwrap();
        let lines = ran.lines("neighbors");
        assert_eq!(lines.iter().map(|l| l["id"].as_str().unwrap()).collect::<Vec<_>>(), ["a", "b", "c", "d", "e"]);
        assert_eq!(ids(&lines[0]["neighbors"], "id"), ["b", "d"]);
        assert_eq!(lines[0]["neighbors"][0]["score"], 1.0);
        assert_eq!(lines[4]["neighbors"], json!([]));
        assert!(ran.logs()[0].contains("1 of 5 items"));
    }

    #[test]
    fn the_reference_loses_the_nearest_and_fills_up() {
        let with = json!({"top_k": 2, "compat": "reference"});
        let ran = run("similarity", with, &[("items", ITEMS)]).unwrap();
        assert_eq!(ids(&ran.json("neighbors")["a"], "item_id"), ["d", "c"]);
        assert_eq!(ids(&ran.json("neighbors")["e"], "item_id"), ["b", "c"]);
        assert!(
            ran.text("neighbors")
                .starts_with("{\n  \"a\": [\n    {\n      \"item_id\": \"d\",\n      \"similarity\": 0.")
        );
    }

    #[test]
    fn the_same_bytes_on_any_number_of_threads() {
        let Some(data) = shared_data() else { return };
        let text = std::fs::read_to_string(data.join("data/industrial/industrial.item.json")).unwrap();
        let on = |threads| run_on(threads, "similarity", json!({}), &[("items", &text)]).unwrap().text("neighbors");
        let one = on(1);
        assert_eq!(one.lines().count(), 3686);
        assert_eq!(one, on(3));
    }

    #[test]
    fn a_model_plans_but_does_not_run() {
        let with = json!({"encoder": {"model": "Qwen/Qwen3-Embedding-8B", "dtype": "bf16", "pooling": "last"}});
        let stage = crate::kind("similarity").unwrap();
        assert_eq!(stage.resources(&stage.resolve_params(&with).unwrap()).unwrap().gpus, 1);
        refuses(run("similarity", with, &[("items", ITEMS)]), &["Qwen/Qwen3-Embedding-8B", "encoder: tfidf"]);
    }

    #[test]
    fn bad_input_and_parameters() {
        refuses(run("similarity", json!({}), &[("items", "")]), &["empty"]);
        refuses(run("similarity", json!({}), &[("items", &ITEMS[..40])]), &["input-items:2"]);
        let stage = crate::kind("similarity").unwrap();
        for (with, path) in [
            (json!({"top_k": 0}), "top_k"),
            (json!({"encoder": {"tfidf": {"max_df": 2}}}), "encoder.tfidf.max_df"),
            (json!({"encoder": "tfdif"}), "encoder"),
            (json!({"encoder": {"model": " "}}), "encoder.model"),
        ] {
            assert_eq!(stage.resolve_params(&with).unwrap_err()[0].path, path);
        }
    }
}
