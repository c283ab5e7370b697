//! How answers are computed: the row job, its function on one device, and from its results to lists of items.
//!
//! A row is one list. Its key holds the prompt's tokens, what is left out, the digest of the model's files, the digest
//! of the TID set and the parameters of decoding: so one more user costs one row, and `top_n`, which only cuts, none.

use std::path::Path;

use grlm_nn::{
    generate::{self, Asked, Catalogue, Free, Generator, Hypothesis, PROMPTS_ON_DEVICE, Trie},
    qwen3::Qwen3,
};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{Decoding, Normalize, Params, Score, Work, budget, queries::Query};
use crate::{
    StageError,
    artifact::{ItemId, Ranking, SftFormat, TID_LENGTH},
    compute::CPU,
    rows::{RowDevice, RowFunction, RowJob, RowRecipe, RowResult},
};

/// Raised when the code changes what it computes for a row.
const ROW_VERSION: u32 = 2;

/// An answer of a row: a TID's number in the trie with its score, an item with its score, or a text.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Answers {
    Tids(Vec<(u32, f32)>),
    Items(Vec<(ItemId, f32)>),
    Texts(Vec<Text>),
}

#[derive(Debug, Serialize, Deserialize)]
struct Text {
    text: String,
    /// Score of the whole text.
    sequence: f32,
    /// Score of its beginning, to the end of the TID.
    tid: f32,
}

/// The rows of a stage, by their keys; `checkpoint` is the digest of the model's folder, `device` what computes
/// ([`Dtype::key`](crate::compute::Dtype::key)).
pub fn job(work: &Work, params: &Params, checkpoint: &str, device: &str) -> RowJob {
    let mut recipe = RowRecipe::new("ranking", ROW_VERSION)
        .bytes("model", checkpoint.as_bytes())
        .bytes("device", device.as_bytes())
        .json(
            "decoding",
            &json!({
                "decoding": params.decoding,
                "beams": params.kept(),
                "normalize": params.normalize,
                "score": params.score,
                "length_penalty": params.length_penalty(),
                "max_new_tokens": (params.decoding == Decoding::Free).then_some(params.max_new_tokens),
            }),
        );
    if params.decoding != Decoding::Free {
        recipe = recipe.bytes("tids", work.tids.digest(params.score == Score::Sequence).as_bytes());
    }
    let bytes = |tokens: &[u32]| tokens.iter().flat_map(|t| t.to_le_bytes()).collect::<Vec<u8>>();
    let key = |query: &Query| {
        let mut row = recipe.row().bytes("prompt", &bytes(&query.prompt));
        if params.decoding != Decoding::Free {
            row = row.bytes("left_out", &bytes(&query.left_out));
        }
        if params.decoding != Decoding::Free && params.score == Score::Sequence {
            row = row.json("seen", &json!(query.seen));
        }
        row.key()
    };
    let costs = work.queries.iter().map(|q| (q.prompt.len() - work.prefix.len()) as u64).collect();
    let keys = work.queries.iter().map(key).collect();
    let piece = if device == CPU { budget::PIECE } else { PROMPTS_ON_DEVICE };
    RowJob::new("ranking", "user", keys).batch(piece).costs(costs)
}

/// Computes lists on one device.
pub struct Decoder<'a> {
    params: &'a Params,
    work: &'a Work,
    generator: Generator<'a>,
    trie: Trie,
    /// Tokens that end a free text.
    ends: Vec<u32>,
    pool: rayon::ThreadPool,
    device: RowDevice,
    /// The model's.
    folder: &'a Path,
}

impl<'a> Decoder<'a> {
    /// # Errors
    /// The shared beginning cannot be read, or `generation_config.json` in the model's `folder`.
    pub fn new(
        params: &'a Params,
        work: &'a Work,
        model: &'a Qwen3,
        folder: &'a Path,
        device: RowDevice,
        smaller: u32,
    ) -> Result<Self, StageError> {
        let pool = device.pool()?;
        let trie = Trie::new(work.tids.sequences())?;
        let longest = work.queries.iter().map(|q| q.prompt.len()).max().unwrap_or(0) - work.prefix.len();
        let batch = match model.is_on_device() {
            true => PROMPTS_ON_DEVICE,
            false => budget::batch(params, work.room, model.config(), &trie, longest, &device),
        } >> smaller.min(16);
        let generator = pool
            .install(|| Generator::new(model, device.threads).with_batch(batch).with_prefix(&work.prefix))
            .map_err(|error| error.of_model(folder))?;
        let ends = model.config().text_ends(folder)?;
        Ok(Self { params, work, generator, trie, ends, pool, device, folder })
    }

    fn answers<'q>(&self, queries: &[&'q Query]) -> Result<Vec<Answers>, grlm_nn::Error> {
        let rest = |query: &&'q Query| -> &'q [u32] { &query.prompt[self.work.prefix.len()..] };
        let penalty = self.params.length_penalty();
        let normalize = match self.params.normalize {
            Normalize::Full => generate::Normalize::Full,
            Normalize::Allowed => generate::Normalize::Allowed,
        };
        match self.params.decoding {
            Decoding::Free => {
                let prompts: Vec<&[u32]> = queries.iter().map(rest).collect();
                let free = Free {
                    beams: self.params.beams,
                    max_new: self.work.room,
                    length_penalty: penalty,
                    ends: self.ends.clone(),
                };
                let texts = free.search(&self.generator, &prompts)?;
                texts.iter().map(|beams| self.texts(beams)).collect()
            }
            Decoding::Catalogue => {
                let asked: Vec<Asked> =
                    queries.iter().map(|q| Asked { tokens: rest(q), left_out: &q.left_out }).collect();
                let search =
                    Catalogue { trie: &self.trie, beams: self.params.beams, normalize, length_penalty: penalty };
                let found = search.search(&self.generator, &asked)?;
                let found = found.into_iter().map(|found| found.into_iter().map(|f| (f.entry, f.score)).collect());
                self.with_titles(queries, found.collect())
            }
            Decoding::Exact => {
                let prompts: Vec<&[u32]> = queries.iter().map(rest).collect();
                let sequences = self.work.tids.sequences();
                let scores =
                    generate::exact(&self.generator, &self.work.prefix, &prompts, sequences, normalize, penalty)?;
                let best = |(scores, query): (Vec<f32>, &&Query)| {
                    let mut all: Vec<(u32, f32)> =
                        (0..).zip(scores).filter(|(e, _)| query.left_out.binary_search(e).is_err()).collect();
                    all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
                    all.truncate(self.params.kept());
                    all
                };
                self.with_titles(queries, scores.into_iter().zip(queries).map(best).collect())
            }
        }
    }

    /// Under `score: sequence` the items of the TIDs that were found are scored with their titles.
    fn with_titles(&self, queries: &[&Query], found: Vec<Vec<(u32, f32)>>) -> Result<Vec<Answers>, grlm_nn::Error> {
        if self.params.score == Score::Tid {
            return Ok(found.into_iter().map(Answers::Tids).collect());
        }
        let tids = &self.work.tids;
        let one = |(query, found): (&&Query, Vec<(u32, f32)>)| {
            let items: Vec<&ItemId> = found.iter().flat_map(|(entry, _)| tids.items_of(*entry)).collect();
            let items: Vec<&ItemId> = items.into_iter().filter(|item| !query.seen.contains(item)).collect();
            let texts: Vec<Vec<u32>> = items.iter().map(|item| tids.text_of(item).to_vec()).collect();
            let prompt = &query.prompt[self.work.prefix.len()..];
            let full = generate::Normalize::Full;
            let penalty = self.params.length_penalty();
            let scores = generate::exact(&self.generator, &self.work.prefix, &[prompt], &texts, full, penalty)?;
            let mut scored: Vec<(ItemId, f32)> = items.into_iter().cloned().zip(scores.into_iter().flatten()).collect();
            // Not in the order of the entry's items, which other users' histories decide.
            scored.sort_by(|a, b| b.1.total_cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
            Ok(Answers::Items(scored))
        };
        queries.iter().zip(found).map(one).collect()
    }

    fn texts(&self, beams: &[Hypothesis]) -> Result<Answers, grlm_nn::Error> {
        let tokenizer = self.work.layout.tokenizer();
        let settings = self.work.layout.settings();
        let end = if settings.format == SftFormat::Text { ']' } else { '\n' };
        let one = |beam: &Hypothesis| -> Result<Text, grlm_nn::Error> {
            let text = tokenizer.decode(&beam.tokens)?;
            // The first tokens that spell the TID to its end.
            let mut length = beam.tokens.len();
            for count in 1..length {
                if tokenizer.decode(&beam.tokens[..count])?.contains(end) {
                    length = count;
                    break;
                }
            }
            let sum: f32 = beam.log_probabilities[..length].iter().sum();
            let tid = sum / (length as f32).powf(self.params.length_penalty());
            Ok(Text { text, sequence: beam.score, tid })
        };
        Ok(Answers::Texts(beams.iter().map(one).collect::<Result<_, _>>()?))
    }
}

impl RowFunction for Decoder<'_> {
    fn compute(&mut self, rows: &[usize]) -> Result<Vec<(usize, RowResult)>, StageError> {
        if self.device.stop.is_set() {
            return Err(StageError::Stopped);
        }
        let queries: Vec<&Query> = rows.iter().map(|row| &self.work.queries[*row]).collect();
        let answers = self.pool.install(|| self.answers(&queries)).map_err(|error| error.of_model(self.folder))?;
        let bytes = |answers| serde_json::to_vec(&answers).map_err(|e| StageError::bug(e.to_string()));
        rows.iter().zip(answers).map(|(row, answers)| Ok((*row, Ok(bytes(answers)?)))).collect()
    }
}

/// From a row's result to a list of items.
///
/// # Errors
/// A bug: the result is not what this version writes.
pub fn ranking(work: &Work, params: &Params, query: &Query, bytes: &[u8]) -> Result<Ranking, StageError> {
    let answers: Answers =
        serde_json::from_slice(bytes).map_err(|e| StageError::bug(format!("a row of `ranking`: {e}")))?;
    let mut list = List { items: Vec::new(), scores: Vec::new(), query, top_n: params.top_n() };
    let mut texts = None;
    match answers {
        Answers::Tids(found) => {
            for (entry, score) in found {
                work.tids.items_of(entry).iter().for_each(|item| list.add(item, score));
            }
        }
        Answers::Items(found) => found.iter().for_each(|(item, score)| list.add(item, *score)),
        Answers::Texts(mut found) => {
            texts = Some(found.iter().map(|t| t.text.clone()).collect());
            if params.score == Score::Tid {
                found.sort_by(|a, b| b.tid.total_cmp(&a.tid));
            }
            for text in &found {
                let score = if params.score == Score::Tid { text.tid } else { text.sequence };
                let key = tid_in(&text.text, work.layout.settings().format);
                key.iter().flat_map(|key| work.tids.items_of_key(key)).for_each(|item| list.add(item, score));
            }
        }
    }
    let List { items, scores, .. } = list;
    Ok(Ranking { user: query.user.clone(), split: query.split, target: query.target.clone(), items, scores, texts })
}

/// A list that grows to its length, without what was seen and without repeats.
struct List<'q> {
    items: Vec<ItemId>,
    scores: Vec<f32>,
    query: &'q Query,
    top_n: usize,
}

impl List<'_> {
    fn add(&mut self, item: &ItemId, score: f32) {
        if self.items.len() < self.top_n && !self.query.seen.contains(item) && !self.items.contains(item) {
            self.items.push(item.clone());
            self.scores.push(score);
        }
    }
}

/// Whether a text holds a TID of the catalogue.
pub fn holds_tid(work: &Work, text: &str) -> bool {
    let key = tid_in(text, work.layout.settings().format);
    key.is_some_and(|key| work.tids.items_of_key(&key).next().is_some())
}

/// The first TID that a text holds, as a key of `tid2item_id`.
fn tid_in(text: &str, format: SftFormat) -> Option<String> {
    match format {
        SftFormat::Text => {
            let inside = text.split_once('[')?.1.split_once(']')?.0;
            Some(inside.replace(", ", ","))
        }
        SftFormat::Compact => {
            let words: Vec<&str> = text.lines().next()?.split_whitespace().take(TID_LENGTH).collect();
            Some(words.join(","))
        }
    }
}
