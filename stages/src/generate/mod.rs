//! Stage `generate`: a language model ranks the catalogue for every held-out user, by writing the next item's TID.
//!
//! Decoding is constrained to the catalogue's TIDs, so that every answer is an item; `decoding: free` writes whatever
//! the model likes, for comparison with the published way, and `decoding: exact` scores every TID of a small catalogue.
//! Here: parameters and the order of work. What can be recommended is [`catalogue`]'s business, who is asked what
//! [`queries`]', and how answers are computed [`decode`]'s. The search itself lives in `grlm_nn::generate`.

use grlm_nn::qwen3::{Config, Qwen3};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::{
    Artifact, Compat, Input, Output, ParamIssue, Ports, Resources, Stage, StageContext, StageError,
    artifact::{Holdout, Id2Meta, Ranking, Split, TID_LENGTH, TokenKind, UserId, jsonl, text},
    compute::{Dtype, PerDevice},
    lm::Layout,
    rows::{self, RowDevice, RowJob},
};

mod budget;
mod catalogue;
mod decode;
mod queries;

use catalogue::Tids;
use decode::Decoder;
use queries::Query;

pub struct Generate;

/// What the model may write.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Decoding {
    /// Beam search over the TIDs of the catalogue: every answer is an item, and no beam is spent on anything else.
    #[default]
    Catalogue,
    /// Beam search over the whole vocabulary. A text counts for the item whose TID it holds exactly; the texts stand in
    /// the rankings, so that `evaluate` with `mapping: reference` can match the others loosely.
    Free,
    /// The score of every TID, without a search. For small catalogues: what beam search is measured against.
    Exact,
}

/// Among what a token's probability is taken.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Normalize {
    /// Among the whole vocabulary: a TID's score is the log-probability that the model gives it, the same that
    /// unconstrained beam search scores it with.
    #[default]
    Full,
    /// Among the tokens that the catalogue allows: another score, and cheaper, since only these tokens are computed.
    Allowed,
}

/// Which part of a text is scored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Score {
    /// The TID, to its end.
    #[default]
    Tid,
    /// All that the model writes for an item. In `decoding: free`, the beam's own score. Otherwise the items that were
    /// found are scored again with their titles, which also tells items of one TID apart.
    Sequence,
}

/// Parameters of `generate`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Params {
    /// What the model may write.
    pub decoding: Decoding,
    /// Beams of each user.
    pub beams: usize,
    /// Items in each user's list; but for `decoding: exact`, there are those of `beams` TIDs at most. Left out, it is 20,
    /// or as many as there are beams.
    pub top_n: Option<usize>,
    /// Among what a token's probability is taken. For `decoding: catalogue` and `exact`.
    pub normalize: Normalize,
    /// Which part of a text is scored.
    pub score: Score,
    /// Scores are sums of log-probabilities, divided by the number of tokens to this power. Left out, it is 0 in the
    /// catalogue (the log-probability itself), and 1 in `decoding: free`, as in transformers.
    pub length_penalty: Option<f32>,
    /// For `decoding: free`: the longest text, in tokens.
    pub max_new_tokens: usize,
    /// Leaves out what the user had before the target. In the catalogue no beam is spent on it.
    pub exclude_seen: bool,
    /// The held-out items to rank for; `valid` too where a later stage tunes on it.
    pub splits: Vec<Split>,
    /// Ranks for a seeded sample of this many users of the holdout; `evaluate` with the same number and seed takes the
    /// same users.
    pub sample_users: Option<usize>,
    /// Seed of the sample.
    pub seed: u64,
    /// The type of weights and arithmetic on a GPU. On the CPU, weights of any type are computed in f32.
    pub dtype: Dtype,
    /// `reference` asks as the published scripts do: the whole history and a trailing `Item text ID: ` in the user's
    /// turn. `fixed` goes on where training left the history.
    pub compat: Compat,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            decoding: Decoding::Catalogue,
            beams: 20,
            top_n: None,
            normalize: Normalize::Full,
            score: Score::Tid,
            length_penalty: None,
            max_new_tokens: 30,
            exclude_seen: true,
            splits: vec![Split::Test],
            sample_users: None,
            seed: 42,
            dtype: Dtype::default(),
            compat: Compat::Fixed,
        }
    }
}

impl Params {
    fn top_n(&self) -> usize {
        self.top_n.unwrap_or(self.beams.min(20))
    }

    /// TIDs that an answer keeps.
    fn kept(&self) -> usize {
        // Nothing is searched in `exact`, so that no beam bounds a list.
        if self.decoding == Decoding::Exact { self.beams.max(self.top_n()) } else { self.beams }
    }

    fn length_penalty(&self) -> f32 {
        self.length_penalty.unwrap_or(if self.decoding == Decoding::Free { 1.0 } else { 0.0 })
    }
}

impl Stage for Generate {
    const KIND: &'static str = "generate";
    const SUMMARY: &'static str =
        "ranks items for each user: a language model writes TIDs, in beams over the catalogue";
    const FLOATING_POINT: bool = true;
    const SHRINKS: bool = true;
    type Params = Params;

    fn ports(_: &Params) -> Ports {
        Ports::new(
            [
                Input::required("checkpoint", Artifact::Checkpoint, "the model, as `train` writes it"),
                Input::required("holdout", Artifact::Holdout, "the users to rank for"),
                Input::required("id2meta", Artifact::Id2meta, "items, with their TIDs"),
                Input::optional(
                    "tid2item_id",
                    Artifact::Tid2itemId,
                    "the items that may be recommended; without it, all of `id2meta` with a valid TID",
                ),
            ],
            [Output::new("rankings", Artifact::Rankings, "rankings.jsonl", "a list for each user and split")],
        )
    }

    fn resources(_: &Params) -> Resources {
        Resources::cpus(2)
    }

    fn check(params: &Params) -> Vec<ParamIssue> {
        let counts =
            [("beams", params.beams), ("top_n", params.top_n.unwrap_or(1)), ("max_new_tokens", params.max_new_tokens)];
        let mut issues: Vec<ParamIssue> = counts
            .into_iter()
            .filter(|(_, count)| *count == 0)
            .map(|(name, _)| ParamIssue::new(name, "must be at least 1"))
            .collect();
        if params.splits.is_empty() {
            issues.push(ParamIssue::new("splits", "nothing to rank for").help("give `test`, `valid` or both"));
        }
        if params.splits.iter().enumerate().any(|(i, split)| params.splits[..i].contains(split)) {
            issues.push(ParamIssue::new("splits", "a split stands twice"));
        }
        if params.sample_users == Some(0) {
            issues.push(ParamIssue::new("sample_users", "a sample needs at least one user"));
        }
        if params.length_penalty.is_some_and(|p| !p.is_finite()) {
            issues.push(ParamIssue::new("length_penalty", "must be a number"));
        }
        if params.decoding == Decoding::Free && params.normalize == Normalize::Allowed {
            issues.push(
                ParamIssue::new("normalize", "free decoding has no catalogue to normalise over")
                    .help("leave it out, or use `decoding: catalogue`"),
            );
        }
        if params.score == Score::Sequence && params.normalize == Normalize::Allowed {
            issues.push(
                ParamIssue::new("score", "titles are scored among the whole vocabulary")
                    .help("use `normalize: full` with `score: sequence`"),
            );
        }
        issues
    }

    fn plan_rows(params: &Params, cx: &mut StageContext) -> Result<Option<RowJob>, StageError> {
        let work = Work::read(params, cx)?;
        Ok(Some(decode::job(&work, params, &cx.input_digest("checkpoint")?, params.dtype.key(cx))))
    }

    fn run(params: &Params, cx: &mut StageContext) -> Result<(), StageError> {
        let work = Work::read(params, cx)?;
        work.say(cx);
        let folder = cx.input("checkpoint")?.to_owned();
        let job = decode::job(&work, params, &cx.input_digest("checkpoint")?, params.dtype.key(cx));
        let smaller = cx.out_of_memory_before();
        let models = PerDevice::new(cx);
        let make = |device: RowDevice| {
            let pool = device.pool()?;
            let place = params.dtype.on(device.device);
            let load = || pool.install(|| Qwen3::load_on(&folder, place));
            let model = models.get(device.device, load)?;
            Decoder::new(params, &work, model, &folder, device, smaller)
        };
        let results = rows::run(cx, &job, make)?;
        let mut out = jsonl::Writer::create(cx.output("rankings")?)?;
        let (mut short, mut empty) = (0, 0);
        let mut written = Written::default();
        for (query, result) in work.queries.iter().zip(results.iter()) {
            let bytes = result.map_err(|e| StageError::bug(format!("user `{}`: {e}", query.user)))?;
            let ranking = decode::ranking(&work, params, query, bytes)?;
            short += usize::from(ranking.items.len() < params.top_n().min(work.tids.items()));
            empty += usize::from(ranking.items.is_empty());
            written.add(&work, &ranking);
            out.write(&ranking)?;
        }
        out.finish()?;
        written.say(cx);
        // Without a TID every list is empty, and that is told.
        if short > 0 && !written.is_in_vain() {
            let all = work.queries.len();
            cx.warn(format!("{short} of {all} lists are shorter than {}, and {empty} are empty", params.top_n()));
        }
        Ok(())
    }
}

/// What came of the texts of `decoding: free`.
#[derive(Default)]
struct Written {
    texts: usize,
    /// Those that hold a TID of the catalogue.
    valid: usize,
    /// The first user, and the best text for them.
    first: Option<(UserId, String)>,
}

impl Written {
    /// Characters of a text that a warning shows.
    const SHOWN: usize = 100;

    fn add(&mut self, work: &Work, ranking: &Ranking) {
        let Some(texts) = &ranking.texts else { return };
        self.texts += texts.len();
        self.valid += texts.iter().filter(|text| decode::holds_tid(work, text)).count();
        if let (None, Some(best)) = (&self.first, texts.first()) {
            self.first = Some((ranking.user.clone(), best.clone()));
        }
    }

    /// There are texts, and none holds a TID.
    fn is_in_vain(&self) -> bool {
        self.first.is_some() && self.valid == 0
    }

    fn say(&self, cx: &mut StageContext) {
        let Some((user, text)) = &self.first else { return };
        let all = self.texts;
        if !self.is_in_vain() {
            cx.info(format!("{} of {all} texts hold a TID of the catalogue", self.valid));
            return;
        }
        let shown = text::beginning(text, Self::SHOWN);
        cx.warn(format!(
            "none of {all} texts holds a TID of the catalogue, and no list has an item; for user `{user}` the model wrote \
             {shown:?}: train it (longer), give it more `max_new_tokens`, or use `decoding: catalogue`, which writes nothing \
             but TIDs"
        ));
    }
}

/// All that is known before a model is loaded.
struct Work {
    layout: Layout,
    tids: Tids,
    queries: Vec<Query>,
    /// Tokens that all prompts begin with.
    prefix: Vec<u32>,
    /// Tokens that an answer takes at most.
    room: usize,
    /// The model learned to tell among what the catalogue allows only, and is asked for more.
    asked_too_much: bool,
}

impl Work {
    fn read(params: &Params, cx: &StageContext) -> Result<Self, StageError> {
        let folder = cx.input("checkpoint")?;
        // The architecture first: an encoder's folder would otherwise be blamed for want of a grlm.json.
        let config = folder.join("config.json").is_file().then(|| Config::load(folder)).transpose()?;
        let (layout, info) = Layout::open(folder)?;
        if params.decoding == Decoding::Free && info.tokens == TokenKind::Prefixes {
            return Err(StageError::params("the model was trained with `tokens: prefixes`, and writes no free text")
                .help("use `decoding: catalogue`, or train with `tokens: words`"));
        }
        let id2meta = Id2Meta::read(cx.input("id2meta")?)?;
        let holdout = read_holdout(params, cx)?;
        let tids = Tids::new(&layout, &id2meta, cx.optional_input("tid2item_id"), &holdout, params.compat)?;
        let room = match (params.decoding, info.tokens) {
            (Decoding::Catalogue | Decoding::Exact, _) => tids.longest(),
            // A model of words writes a TID in five, and would go on with the next item.
            (Decoding::Free, TokenKind::Words) => params.max_new_tokens.min(TID_LENGTH),
            (Decoding::Free, _) => params.max_new_tokens,
        };
        let queries = queries::build(params, &layout, &id2meta, &tids, &holdout, room)?;
        if let Some(config) = config {
            queries::check_positions(&queries, config.max_positions, params.compat)?;
        }
        let prefix = queries::common_prefix(&queries).to_vec();
        let asked_too_much = params.normalize == Normalize::Full
            && info.trained_from.get("normalize").is_some_and(|learned| *learned == json!(Normalize::Allowed));
        Ok(Self { layout, tids, queries, prefix, room, asked_too_much })
    }

    fn say(&self, cx: &mut StageContext) {
        cx.info(format!(
            "{} items under {} TIDs; {} lists to make",
            self.tids.items(),
            self.tids.sequences().len(),
            self.queries.len()
        ));
        let cut = self.queries.iter().filter(|query| query.dropped > 0).count();
        if cut > 0 {
            cx.info(format!("{cut} histories are longer than the model reads: their oldest items are left out"));
        }
        if self.tids.without_words > 0 {
            cx.info(format!("{} items have no valid TID and are never recommended", self.tids.without_words));
        }
        if self.asked_too_much {
            cx.warn("the model was trained with `normalize: allowed`; rankings with `normalize: full` will be poor");
        }
        if self.tids.unwritable > 0 {
            cx.warn(format!(
                "{} items can never be recommended: the model's vocabulary lacks a word of their TIDs",
                self.tids.unwritable
            ));
        }
    }
}

/// The users to rank for, in the holdout's order.
fn read_holdout(params: &Params, cx: &StageContext) -> Result<Vec<Holdout>, StageError> {
    let path = cx.input("holdout")?;
    let mut holdout: Vec<Holdout> = jsonl::read(path)?;
    if holdout.is_empty() {
        return Err(StageError::input(path, "no users are held out")
            .help("users need at least three items that all have a valid TID"));
    }
    if let Some(count) = params.sample_users {
        let chosen = crate::sampling::sample_users(holdout.iter().map(|h| &h.user), count, params.seed);
        let mut chosen = chosen.into_iter();
        holdout.retain(|_| chosen.next().unwrap_or(false));
    }
    Ok(holdout)
}

#[cfg(test)]
mod tests;
