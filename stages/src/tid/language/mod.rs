//! Five words for every item by a language model: asked with the item and its neighbours, asked again where the answer
//! is of no use, and asked for another last word where two items would share a TID.
//!
//! Every answer is a row of its own: it is kept under its conversation, the model and how it decodes, and is asked
//! for again only when one of these changes. Neither the server's address nor the number of attempts is among them.

use std::collections::HashMap;

use grlm_nn::chat::Message;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{Found, parse, prompt};
use crate::{
    Compat, ParamIssue, StageContext, StageError,
    artifact::{Item, ItemId, Neighbor},
    compute::Dtype,
    endpoint, model_folder,
};

mod ask;
mod dialogue;
mod distinguish;
mod served;
#[cfg(test)]
mod tests;

pub use ask::{Asker, PLACE};
use dialogue::Record;

/// A language model that is asked for each item's words: a folder on this machine, or the name by which a server at
/// `endpoint` knows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LanguageModel {
    /// A model folder, or a repository on the Hugging Face hub; with `endpoint`, the server's name for it.
    pub model: String,
    /// The revision of the repository; with `endpoint`, any word that tells one state of the model from another.
    #[serde(default)]
    pub revision: Option<String>,
    /// The type of weights and arithmetic on a GPU. On the CPU, weights of any type are computed in f32.
    #[serde(default)]
    pub dtype: Dtype,
    /// Longest answer, in tokens.
    #[serde(default = "max_new_tokens")]
    pub max_new_tokens: u32,
    /// How often an item is asked for before its answer counts as invalid. More attempts go on from the answers that
    /// there are.
    #[serde(default = "max_attempts")]
    pub max_attempts: u32,
    /// How many rounds of questions there are about items that share a TID, with `resolve_collisions`.
    #[serde(default = "collision_rounds")]
    pub collision_rounds: u32,
    /// The address of a server that speaks OpenAI's `/v1/chat/completions`, such as `http://localhost:8000/v1`.
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

fn max_new_tokens() -> u32 {
    50
}

fn max_attempts() -> u32 {
    3
}

fn collision_rounds() -> u32 {
    3
}

impl LanguageModel {
    pub fn check(&self) -> Vec<ParamIssue> {
        let mut issues = Vec::new();
        if self.model.trim().is_empty() {
            issues.push(ParamIssue::new("extractor.model", "the model has no name"));
        }
        if self.max_attempts == 0 {
            issues.push(ParamIssue::new("extractor.max_attempts", "must be at least 1"));
        }
        if self.collision_rounds == 0 {
            let message = "must be at least 1; `resolve_collisions: false` asks no such questions";
            issues.push(ParamIssue::new("extractor.collision_rounds", message));
        }
        if self.max_new_tokens == 0 {
            issues.push(ParamIssue::new("extractor.max_new_tokens", "must be at least 1"));
        }
        if self.endpoint.is_some() && self.dtype != Dtype::default() {
            let message = "is the server's to say: it has no meaning beside `endpoint`";
            issues.push(ParamIssue::new("extractor.dtype", message));
        }
        issues.extend(self.endpoint_settings().check(endpoint::Request::Chat, "extractor", self.endpoint.as_deref()));
        if self.endpoint.is_none() && issues.is_empty() {
            issues.extend(model_folder::issue(PLACE, &self.name()));
        }
        issues
    }

    /// As [`crate::Stage::models`] names it.
    pub fn name(&self) -> String {
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
}

/// What the answers took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Spent {
    /// Conversations with an answer.
    pub answers: u64,
    /// Requests beyond the first of each conversation.
    pub asked_again: u64,
    pub prompt_tokens: u64,
    pub answer_tokens: u64,
}

impl Spent {
    fn add(&mut self, record: &Record) {
        self.answers += 1;
        self.asked_again += u64::from(record.attempts.saturating_sub(1));
        self.prompt_tokens += record.prompt_tokens;
        self.answer_tokens += record.answer_tokens;
    }
}

/// What a model is asked about.
pub struct Catalogue<'a> {
    pub items: &'a [Item],
    pub neighbors: &'a dyn Fn(&ItemId) -> &'a [Neighbor],
    /// The text with placeholders.
    pub template: &'a str,
    pub compat: Compat,
    /// Items that are not asked about: they have words already.
    pub given: &'a dyn Fn(&ItemId) -> bool,
}

impl Catalogue<'_> {
    /// The prompt of each item that is asked about, and its place among the items. `fixed` leaves out items that have
    /// neither title nor description.
    pub fn prompts(&self) -> (Vec<usize>, Vec<Vec<Message>>) {
        let by_id: HashMap<&ItemId, &Item> = self.items.iter().map(|item| (&item.id, item)).collect();
        let wordless = |item: &Item| item.text("title").is_none() && item.description().is_none();
        let asked = self
            .items
            .iter()
            .enumerate()
            .filter(|(_, item)| !(self.given)(&item.id) && (self.compat.is_reference() || !wordless(item)));
        let prompt = |(place, item): (usize, &Item)| {
            let text = prompt::render(self.template, item, (self.neighbors)(&item.id), &by_id, self.compat);
            (place, vec![Message::user(text)])
        };
        asked.map(prompt).unzip()
    }

    /// The ids of items at some places.
    fn names(&self, places: &[usize]) -> Vec<String> {
        places.iter().map(|place| self.items[*place].id.to_string()).collect()
    }
}

/// Words for each item; items that are not asked about have none, and no problem.
///
/// # Errors
/// The model cannot be used, or has no answer for more items than may be.
pub fn extract(
    cx: &mut StageContext,
    asker: &mut Asker,
    catalogue: &Catalogue,
) -> Result<(Vec<Found>, Spent), StageError> {
    let (places, prompts) = catalogue.prompts();
    let mut found: Vec<Found> = catalogue
        .items
        .iter()
        .map(|item| {
            let problem = (!(catalogue.given)(&item.id)).then(|| "no usable text".to_owned());
            Found { words: Vec::new(), output: String::new(), problem }
        })
        .collect();
    let mut spent = Spent::default();
    let mut answered = Vec::new();
    for (place, answer) in places.iter().zip(asker.ask(cx, &catalogue.names(&places), &prompts)?) {
        found[*place] = match answer {
            Ok(record) => {
                spent.add(&record);
                answered.push(*place);
                read(&record, catalogue.compat)
            }
            Err(failure) => Found { words: Vec::new(), output: String::new(), problem: Some(failure) },
        };
    }
    if let Some(first) = answered.first()
        && answered.iter().all(|place| found[*place].problem.is_some())
        && let Some(warning) = asker.in_vain(answered.len(), &catalogue.items[*first].id, &found[*first])
    {
        cx.warn(warning);
    }
    Ok((found, spent))
}

/// Asks for other words where items share a TID; `taken` are TIDs that are given. Returns how many still share theirs,
/// be it that the model had no other word or no answer.
///
/// # Errors
/// The model cannot be used.
pub fn distinguish(
    cx: &mut StageContext,
    asker: &mut Asker,
    catalogue: &Catalogue,
    found: &mut [Found],
    taken: impl IntoIterator<Item = Vec<String>>,
    spent: &mut Spent,
    rounds: u32,
) -> Result<usize, StageError> {
    let (places, prompts) = catalogue.prompts();
    let titles = |place: usize| {
        let item = &catalogue.items[place];
        item.text("title").or_else(|| item.description()).map_or_else(|| item.id.to_string(), Into::into)
    };
    let mut state = distinguish::Rounds::new(&places, &prompts, found, taken);
    for _ in 0..rounds {
        let (asked, questions) = state.questions(&titles);
        if asked.is_empty() {
            break;
        }
        let answers = asker.ask_further(cx, &catalogue.names(&asked), &questions)?;
        for (place, answer) in asked.into_iter().zip(answers) {
            let record = answer.ok();
            if let Some(record) = &record {
                spent.add(record);
            }
            state.take(place, record.map(|record| read(&record, catalogue.compat)));
        }
    }
    Ok(state.left())
}

/// The words of an answer.
fn read(record: &Record, compat: Compat) -> Found {
    let answer = record.answer.as_str();
    let cut = if record.cut { ", which `max_new_tokens` cut off" } else { "" };
    if compat.is_reference() {
        let words = parse::reference(answer);
        let problem =
            (words.is_empty() || words.iter().any(String::is_empty)).then(|| format!("blank words in the answer{cut}"));
        return Found { words, output: parse::reference_output(answer).to_owned(), problem };
    }
    let output = answer.trim().to_owned();
    match parse::fixed(answer, record.cut) {
        Ok(words) => Found { words: words.to_vec(), output, problem: None },
        Err(unusable) => {
            let times = if record.attempts == 1 { "once".to_owned() } else { format!("{} times", record.attempts) };
            let problem = format!("{unusable}{cut}, asked {times}");
            Found { words: unusable.into_words(), output, problem: Some(problem) }
        }
    }
}
