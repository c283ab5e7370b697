//! What a run is judged by while it goes on: held-out items, a file of its own, or a share of the samples.

use grlm_nn::train::{Corpus, Sample as Tokens};
use rand::{SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;

use super::{
    data,
    params::{Params, Validation as Settings},
};
use crate::{
    StageContext, StageError,
    artifact::{Holdout, Id2Meta, TidRecord, jsonl},
    lm::{Layout, Sample},
    sampling::sample_users,
};

/// What is looked at.
#[derive(Default)]
pub struct Validation {
    /// Samples whose loss is taken.
    pub samples: Vec<Tokens>,
    /// The users behind them, where they are held-out items.
    pub users: Vec<User>,
}

/// A user whose next item is known and was held out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    pub prompt: Vec<u32>,
    /// The place of the held-out item in the catalogue.
    pub target: usize,
}

impl Validation {
    pub fn is_empty(&self) -> bool {
        self.samples.is_empty()
    }
}

/// Takes validation from the inputs; with `share`, from the corpus.
///
/// # Errors
/// A file is wrong; an item of `holdout` is not in `id2meta`; `recall` without held-out items.
pub fn build(
    params: &Params,
    layout: &Layout,
    id2meta: Option<&Id2Meta>,
    corpus: &mut Corpus,
    cx: &mut StageContext,
) -> Result<Validation, StageError> {
    let settings = &params.validation;
    let validation = match (cx.optional_input("holdout"), id2meta, cx.optional_input("valid")) {
        (Some(path), Some(id2meta), _) => {
            let holdout: Vec<Holdout> = jsonl::read(path)?;
            let chosen = sample_users(holdout.iter().map(|h| &h.user), settings.users, params.seed);
            let users: Vec<&Holdout> = holdout.iter().zip(chosen).filter(|(_, c)| *c).map(|(h, _)| h).collect();
            held_out(params, layout, id2meta, &users, path)?
        }
        (Some(path), None, _) => {
            return Err(
                StageError::input(path, "held-out items, and no `id2meta` to name them").help("connect `id2meta` too")
            );
        }
        (None, _, Some(path)) => {
            let mut samples = Sample::read(path)?;
            samples.shuffle(&mut ChaCha8Rng::seed_from_u64(params.seed));
            samples.truncate(settings.users);
            let (samples, _) = data::tokenise(params, &samples, layout)?;
            Validation { samples, users: Vec::new() }
        }
        (None, _, None) => Validation { samples: share(settings, corpus, params.seed), users: Vec::new() },
    };
    check_any(settings, validation.is_empty(), cx)?;
    if settings.recall && validation.users.is_empty() {
        return Err(
            StageError::params("`validation.recall` needs held-out items").help("connect `holdout` and `id2meta`")
        );
    }
    if !validation.is_empty() {
        cx.info(format!(
            "validation: {} {}",
            validation.samples.len(),
            match validation.users.is_empty() {
                true => "samples",
                false => "held-out items",
            }
        ));
    }
    Ok(validation)
}

/// Refuses validation that was asked for and would not take place.
pub(super) fn check_any(settings: &Settings, is_empty: bool, cx: &StageContext) -> Result<(), StageError> {
    let asked = settings.share > 0.0 || cx.optional_input("valid").is_some();
    match asked && is_empty {
        true => Err(StageError::params("nothing is left to validate on").help(
            "`valid` needs samples with a response; `validation.share` of the samples must come to one at least",
        )),
        false => Ok(()),
    }
}

fn held_out(
    params: &Params,
    layout: &Layout,
    id2meta: &Id2Meta,
    users: &[&Holdout],
    path: &std::path::Path,
) -> Result<Validation, StageError> {
    let place = |id: &str| {
        id2meta.place(id).ok_or_else(|| {
            StageError::input(path, format!("item `{id}` is not in `id2meta`"))
                .help("`holdout` and `id2meta` must come from one catalogue")
        })
    };
    let mut validation = Validation::default();
    let mut unwritable = 0u64;
    for user in users {
        let history: Vec<&TidRecord> = user
            .history
            .iter()
            .map(|id| place(id.as_str()).map(|p| &id2meta.records()[p]))
            .collect::<Result<_, _>>()?;
        let target = place(user.valid.as_str())?;
        let Some(tid) = layout.tid(&id2meta.records()[target], params.compat)? else {
            unwritable += 1;
            continue;
        };
        if history.is_empty() {
            continue;
        }
        let prompt = layout.prompt(&history, params.compat, tid.len())?.tokens;
        let mut tokens = prompt.clone();
        tokens.extend(tid);
        validation.samples.push(Tokens { tokens, learned_from: prompt.len() });
        validation.users.push(User { prompt, target });
    }
    if validation.samples.is_empty() {
        return Err(StageError::input(
            path,
            format!("no held-out item can be written ({unwritable} have unknown words)"),
        )
        .help("the samples must come from the catalogue of `id2meta`"));
    }
    Ok(validation)
}

/// Moves a share of every source's samples out of the corpus.
pub(super) fn share(settings: &Settings, corpus: &mut Corpus, seed: u64) -> Vec<Tokens> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut held = Vec::new();
    for source in &mut corpus.sources {
        let count = (source.samples.len() as f64 * settings.share).round() as usize;
        let mut order: Vec<usize> = (0..source.samples.len()).collect();
        order.shuffle(&mut random);
        let mut out: Vec<usize> = order.into_iter().take(count.min(source.samples.len() - 1)).collect();
        out.sort_unstable_by(|a, b| b.cmp(a));
        held.extend(out.into_iter().map(|at| source.samples.remove(at)));
    }
    held.shuffle(&mut random);
    held.truncate(settings.users);
    held
}
