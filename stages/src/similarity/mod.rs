//! Stage `similarity`: for each item of a catalogue, the items whose texts are most alike.
//!
//! `reference`: the published file's layout, and its loss of the nearest neighbour: ranks 2 to `top_k` + 1, where the
//! nearest was taken for the item itself; items that share nothing fill a list up, in catalogue order. `fixed`: ranks
//! 1 to `top_k`, JSON Lines, and only items that share something; items without a text are nobody's neighbours.
//!
//! Items are embedded by the `tfidf` encoder, or as rows by a model ([`embed`]): a folder or a server.

use std::collections::BTreeMap;

use grlm_nn::nearest;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{
    Artifact, Compat, Device, Input, Output, ParamIssue, Ports, Resources, Stage, StageContext, StageError,
    artifact::{Item, Neighbor, Neighbors, items, jsonl, neighbors},
    compute::Dtype,
    endpoint,
    method::Method,
    model_folder,
    rows::RowJob,
    threads,
};

mod alone;
mod embed;
pub mod text;
pub mod tfidf;

use alone::Alone;
use tfidf::Tfidf;

/// Where texts are cut, unless something else is said.
const MAX_TOKENS: u32 = 512;
/// Few texts have longer tokens: what is cut off by it, a model that cuts by tokens would not have seen.
const CHARACTERS_PER_TOKEN: usize = 8;

pub struct Similarity;

/// An embedding model: a folder on this machine, or the name by which a server at `endpoint` knows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EmbeddingModel {
    /// A model folder, or a repository on the Hugging Face hub; with `endpoint`, the server's name for it.
    pub model: String,
    /// The revision of the repository; with `endpoint`, any word that tells one state of the model from another.
    #[serde(default)]
    pub revision: Option<String>,
    /// The type of weights and arithmetic on a GPU. On the CPU, weights of any type are computed in f32.
    #[serde(default)]
    pub dtype: Dtype,
    /// How token vectors become one: as the model was trained, unless given; `reference` takes the mean.
    #[serde(default)]
    pub pooling: Option<Pooling>,
    /// Texts are cut to this many tokens, special ones included: 512 unless given, or fewer where the model's
    /// `sentence_bert_config.json` says so. With `endpoint`, whose tokens are not known here, to eight times as many
    /// characters; a server that refuses long texts has to be told to cut them, by `extra_body`.
    #[serde(default)]
    pub max_tokens: Option<u32>,
    /// What every text begins with, such as E5's `query: `.
    #[serde(default)]
    pub prefix: String,
    /// The address of a server that speaks OpenAI's `/v1/embeddings`, such as `http://localhost:8000/v1`.
    #[serde(default)]
    pub endpoint: Option<String>,
    /// The environment variable that holds the server's key; declare it at the stage: `secrets: [NAME]`.
    #[serde(default)]
    pub api_key_env: Option<String>,
    /// Requests to the server that are under way at once.
    #[serde(default = "endpoint::concurrency")]
    pub concurrency: usize,
    /// Seconds in which a whole answer must have come.
    #[serde(default = "endpoint::timeout")]
    pub timeout: f64,
    /// How often a request that failed is tried again.
    #[serde(default = "endpoint::retries")]
    pub retries: u32,
    /// Further fields of each request, as the server knows them; `null` takes one of ours away.
    #[serde(default)]
    pub extra_body: Map<String, Value>,
}

impl EmbeddingModel {
    fn name(&self) -> String {
        model_folder::name(&self.model, self.revision.as_deref())
    }

    fn endpoint_settings(&self) -> endpoint::Settings {
        endpoint::Settings {
            api_key_env: self.api_key_env.clone(),
            concurrency: self.concurrency,
            timeout: self.timeout,
            retries: self.retries,
            extra_body: self.extra_body.clone(),
        }
    }

    fn check(&self) -> Vec<ParamIssue> {
        let mut issues = Vec::new();
        if self.model.trim().is_empty() {
            issues.push(ParamIssue::new("encoder.model", "the model has no name"));
        }
        if self.max_tokens == Some(0) {
            issues.push(ParamIssue::new("encoder.max_tokens", "must be at least 1"));
        }
        if self.endpoint.is_some() {
            let theirs = [("pooling", self.pooling.is_some()), ("dtype", self.dtype != Dtype::default())];
            for (name, _) in theirs.into_iter().filter(|(_, given)| *given) {
                let message = "is the server's to say: it has no meaning beside `endpoint`";
                issues.push(ParamIssue::new(format!("encoder.{name}"), message));
            }
        }
        let request = endpoint::Request::Embeddings;
        issues.extend(self.endpoint_settings().check(request, "encoder", self.endpoint.as_deref()));
        if self.endpoint.is_none() && issues.is_empty() {
            issues.extend(model_folder::issue(embed::PLACE, &self.name()));
        }
        issues
    }

    /// What the model is given of an item's text.
    fn given(&self, text: &str) -> String {
        let mut text = self.prefix.clone() + text;
        let most = self.max_tokens.unwrap_or(MAX_TOKENS) as usize * CHARACTERS_PER_TOKEN;
        if self.endpoint.is_some()
            && let Some((end, _)) = text.char_indices().nth(most)
        {
            text.truncate(end);
        }
        text
    }

    /// With what `reference` means where nothing is said.
    fn in_compat(&self, compat: Compat) -> Self {
        let mut model = self.clone();
        if compat.is_reference() && model.endpoint.is_none() {
            model.pooling.get_or_insert(Pooling::Mean);
            model.max_tokens.get_or_insert(MAX_TOKENS);
        }
        model
    }
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
    /// What makes a vector of an item's text: `tfidf`, `{ model: FOLDER, pooling, max_tokens, … }`, or
    /// `{ endpoint: URL, model: NAME, … }`.
    pub encoder: Method<Tfidf, EmbeddingModel>,
    /// Neighbours of each item.
    pub top_k: usize,
    /// How many items may be left without neighbours because the model had no answer for them.
    pub max_failed_rows: usize,
    /// Which behaviour to follow where the published script is known to be wrong.
    pub compat: Compat,
}

impl Default for Params {
    fn default() -> Self {
        Self { encoder: Method::default(), top_k: 20, max_failed_rows: 0, compat: Compat::Fixed }
    }
}

impl Stage for Similarity {
    const KIND: &'static str = "similarity";
    const SUMMARY: &'static str = "the most similar items of each item, by their texts";
    const FLOATING_POINT: bool = true;
    const SHRINKS: bool = true;
    type Params = Params;

    fn ports(params: &Params) -> Ports {
        let file = if params.compat.is_reference() { "similarities.json" } else { "neighbors.jsonl" };
        Ports::new(
            [Input::required("items", Artifact::Items, "the catalogue")],
            [Output::new("neighbors", Artifact::Neighbors, file, "each item's neighbours, best first")],
        )
    }

    fn resources(params: &Params) -> Resources {
        match &params.encoder {
            Method::BuiltIn(_) => Resources::cpus(2),
            Method::Model(model) => model_folder::resources(model.endpoint.is_some()),
        }
    }

    fn models(params: &Params) -> BTreeMap<String, String> {
        match &params.encoder {
            Method::Model(model) if model.endpoint.is_none() => [(embed::PLACE.to_owned(), model.name())].into(),
            _ => BTreeMap::new(),
        }
    }

    fn secrets(params: &Params) -> BTreeMap<String, String> {
        match &params.encoder {
            Method::Model(model) => endpoint::secret("encoder", model.api_key_env.as_deref()),
            Method::BuiltIn(_) => BTreeMap::new(),
        }
    }

    fn check(params: &Params) -> Vec<ParamIssue> {
        let mut issues = match &params.encoder {
            Method::BuiltIn(tfidf) => tfidf.check(),
            Method::Model(model) => model.check(),
        };
        if params.top_k == 0 || params.top_k > 10_000 {
            issues.push(ParamIssue::new("top_k", "must be from 1 to 10000"));
        }
        issues
    }

    fn plan_rows(params: &Params, cx: &mut StageContext) -> Result<Option<RowJob>, StageError> {
        let Method::Model(model) = &params.encoder else { return Ok(None) };
        let identity = match &model.endpoint {
            Some(_) => Some(String::new()),
            None => cx.model_identity_at_hand(embed::PLACE, &model.name())?,
        };
        let Some(identity) = identity else { return Ok(None) };
        let (texts, _) = texts(&items::read(cx.input("items")?)?, model, params.compat);
        let device = model.dtype.key(cx);
        Ok(Some(embed::job(&model.in_compat(params.compat), &identity, device, &texts)))
    }

    fn run(params: &Params, cx: &mut StageContext) -> Result<(), StageError> {
        let items = items::read(cx.input("items")?)?;
        let reference = params.compat.is_reference();
        let wanted = params.top_k + usize::from(reference);
        let (mut found, why) = match &params.encoder {
            Method::BuiltIn(tfidf) => by_tfidf(tfidf, cx, &items, wanted)?,
            Method::Model(model) => by_model(params, model, cx, &items, wanted)?,
        };
        alone::tell(cx, &items, &found, &why, params.compat);
        if reference {
            for (own, row) in found.iter_mut().enumerate() {
                fill_up(row, own, wanted.min(items.len() - 1), items.len());
                if !row.is_empty() {
                    row.remove(0);
                }
            }
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

/// The texts that a model is given, and the item of each. `fixed` leaves out items without a text.
fn texts(items: &[Item], model: &EmbeddingModel, compat: Compat) -> (Vec<String>, Vec<usize>) {
    let texts = items.iter().enumerate().filter_map(|(place, item)| {
        let text = text::item_text(item, compat);
        (compat.is_reference() || !text.is_empty()).then(|| (model.given(&text), place))
    });
    texts.unzip()
}

/// The nearest items of each item, and why some have no vector that is near to any.
type Found = (Vec<Vec<(u32, f32)>>, Vec<Option<Alone>>);

/// The `wanted` nearest items of each, by their words.
fn by_tfidf(tfidf: &Tfidf, cx: &StageContext, items: &[Item], wanted: usize) -> Result<Found, StageError> {
    threads::pool(cx)?.install(|| {
        let vectors = tfidf.encode(items);
        let why = |(item, vector): (&Item, &Vec<_>)| match vector.is_empty() {
            true if Tfidf::FIELDS.iter().all(|field| item.text(field).is_none()) => Some(Alone::NoText),
            true => Some(Alone::NoWord),
            false => None,
        };
        Ok((tfidf::top_k(&vectors, wanted), items.iter().zip(&vectors).map(why).collect()))
    })
}

/// The `wanted` nearest items of each, by a model's vectors.
fn by_model(
    params: &Params,
    model: &EmbeddingModel,
    cx: &mut StageContext,
    items: &[Item],
    wanted: usize,
) -> Result<Found, StageError> {
    let (texts, places) = texts(items, model, params.compat);
    let mut why = vec![Some(Alone::NoText); items.len()];
    places.iter().for_each(|place| why[*place] = None);
    let names = places.iter().map(|place| items[*place].id.to_string()).collect();
    let embedded = embed::embed(cx, &model.in_compat(params.compat), &texts, names, params.max_failed_rows)?;
    embedded.failed.iter().for_each(|text| why[places[*text]] = Some(Alone::NoAnswer));
    embedded.zero.iter().for_each(|text| why[places[*text]] = Some(Alone::Zero));
    let place = Dtype::F32.on(cx.devices().first().copied().unwrap_or(Device::Cpu));
    let near = threads::pool(cx)?.install(|| nearest::top_k_on(place, &embedded.vectors, embedded.width, wanted))?;
    let place = |row: usize| places[embedded.texts[row]];
    let mut found = vec![Vec::new(); items.len()];
    for (row, near) in near.into_iter().enumerate() {
        found[place(row)] = near.into_iter().map(|(other, score)| (place(other as usize) as u32, score)).collect();
    }
    Ok((found, why))
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
mod tests;
