//! From SFT files to a tokenised corpus: what is read, how it is laid out, and what had to be cut or left out.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use grlm_nn::{
    Tokenizer,
    tokenizer::special,
    train::{Corpus, Sample as Tokens, Source},
};
use rayon::prelude::*;

use super::params::{Method, Params, TokensChoice};
use crate::{
    StageContext, StageError,
    artifact::{ChatTemplate, CheckpointInfo, Id2Meta, SftFormat, TokenKind},
    lm::{Layout, Sample, Settings, Shape, prefixes},
};

/// Ports that do not hold samples to train on.
const OTHER_PORTS: [&str; 4] = ["model", "valid", "holdout", "id2meta"];

/// The samples of one input.
pub struct File {
    pub port: String,
    pub path: PathBuf,
    pub samples: Vec<Sample>,
    pub weight: f64,
}

/// Reads all inputs that hold samples, `sft` first.
///
/// # Errors
/// A file is empty or wrong; `weights` names an input that is not connected.
pub fn read(params: &Params, cx: &StageContext) -> Result<Vec<File>, StageError> {
    let mut files = Vec::new();
    let inputs: Vec<(&str, &Path)> = cx.inputs().filter(|(port, _)| !OTHER_PORTS.contains(port)).collect();
    let (first, others): (Vec<_>, Vec<_>) = inputs.into_iter().partition(|(port, _)| *port == "sft");
    for (port, path) in first.into_iter().chain(others) {
        let weight = params.weights.get(port).copied().unwrap_or(1.0);
        files.push(File { port: port.to_owned(), path: path.to_owned(), samples: Sample::read(path)?, weight });
    }
    if let Some(name) = params.weights.keys().find(|name| files.iter().all(|f| f.port != **name)) {
        let ports: Vec<&str> = files.iter().map(|f| f.port.as_str()).collect();
        return Err(StageError::params(format!("`weights` names `{name}`, and no such input is connected"))
            .help(format!("connected are: {}", ports.join(", "))));
    }
    Ok(files)
}

/// How histories are written in these files; text where there are none.
///
/// # Errors
/// Some are text and some compact.
pub fn format_of(files: &[File]) -> Result<SftFormat, StageError> {
    let mut compact: Option<&File> = None;
    let mut text: Option<&File> = None;
    for file in files {
        for sample in &file.samples {
            match sample.shape() {
                Shape::Compact => compact = compact.or(Some(file)),
                Shape::History => text = text.or(Some(file)),
                Shape::Other => {}
            }
        }
    }
    match (compact, text) {
        (Some(compact), Some(text)) => Err(StageError::input(
            &text.path,
            format!("histories as text, and compact ones in {}", compact.path.display()),
        )
        .help("a model learns one form of history: give `sft_rec` the same `format` in both")),
        (Some(_), None) => Ok(SftFormat::Compact),
        _ => Ok(SftFormat::Text),
    }
}

/// The instruction of the histories.
fn instruction_of(files: &[File]) -> String {
    let mut samples = files.iter().flat_map(|f| &f.samples);
    samples.find(|s| s.shape() == Shape::History).map(|s| s.instruction.clone()).unwrap_or_default()
}

/// The layout for these files: its tokenizer is made, or read from `base`, the folder of the model to start from.
///
/// # Errors
/// Samples that are not compact under `tokens: words`; a tokenizer that lacks the template's tokens.
pub fn layout(
    params: &Params,
    files: &[File],
    id2meta: Option<&Id2Meta>,
    base: Option<&Path>,
) -> Result<Layout, StageError> {
    let format = format_of(files)?;
    // A model that `train` made before goes on as it began.
    let before = base.filter(|folder| CheckpointInfo::path(folder).exists()).map(CheckpointInfo::read).transpose()?;
    let others =
        files.iter().flat_map(|f| f.samples.iter().map(move |s| (f, s))).find(|(_, s)| s.shape() != Shape::Compact);
    let tokens = match (params.tokens, params.method, &before) {
        (TokensChoice::Auto, Method::Scratch, _) if others.is_none() => TokenKind::Words,
        (TokensChoice::Auto, Method::Full | Method::Lora, Some(info)) => info.tokens,
        (TokensChoice::Auto | TokensChoice::Model, _, _) => TokenKind::Model,
        (TokensChoice::Words, _, _) => TokenKind::Words,
        (TokensChoice::Prefixes, _, _) => TokenKind::Prefixes,
    };
    let words = tokens != TokenKind::Model;
    if let (true, Some((file, sample))) = (words, others) {
        let shown: String = sample.content().chars().chain(sample.output.chars()).take(40).collect();
        return Err(StageError::input(&file.path, format!("a sample that is not lines of five words: `{shown}…`"))
            .help("one token a word is for `sft_rec` with `format: compact` alone; use `tokens: model`"));
    }
    if let (true, Some(template)) = (words, params.template.fixed().filter(|t| *t != ChatTemplate::None)) {
        return Err(StageError::params(format!(
            "samples of one token a word have no template, and `template` is {template:?}"
        ))
        .help("leave `template` out, or use `tokens: model`"));
    }
    let template = match (params.template.fixed(), params.method, &before) {
        (Some(template), _, _) => template,
        (None, _, Some(info)) => info.template,
        (None, Method::Scratch, None) => ChatTemplate::None,
        (None, _, None) => ChatTemplate::Qwen3Nothink,
    };
    let tokenizer = match base {
        Some(folder) => Tokenizer::load(folder)?,
        None if tokens == TokenKind::Words => words_tokenizer(files, id2meta)?,
        None if tokens == TokenKind::Prefixes => prefixes_tokenizer(files, id2meta)?,
        None => {
            let content: Vec<String> = files.iter().flat_map(|f| f.samples.iter().map(Sample::content)).collect();
            let outputs = files.iter().flat_map(|f| f.samples.iter().map(|s| s.output.as_str()));
            let texts: Vec<&str> = content.iter().map(String::as_str).chain(outputs).collect();
            Tokenizer::learn(texts.into_iter(), params.architecture.vocabulary)?
        }
    };
    let bos = match (&before, base) {
        (Some(info), _) if info.template == template => info.bos.clone(),
        (_, Some(_)) => None,
        (_, None) if words => Some(special::WORDS_START.to_owned()),
        (_, None) => (template == ChatTemplate::None).then(|| special::TEXT_START.to_owned()),
    };
    let settings =
        Settings { format, tokens, template, bos, instruction: instruction_of(files), max_length: params.max_length };
    Layout::new(tokenizer, settings)
}

/// A token for every word of the catalogue, and of the samples, in alphabetical order.
fn words_tokenizer(files: &[File], id2meta: Option<&Id2Meta>) -> Result<Tokenizer, StageError> {
    let catalogue = id2meta.into_iter().flat_map(|all| all.records()).filter(|r| r.has_valid_tid());
    let named = catalogue.flat_map(|r| r.clean_words()).flat_map(str::split_whitespace);
    let written = files.iter().flat_map(|f| &f.samples).flat_map(|s| s.output.split_whitespace());
    let words: BTreeSet<&str> = named.chain(written).collect();
    of_names(words)
}

/// As [`words_tokenizer`], for the beginnings of TIDs.
fn prefixes_tokenizer(files: &[File], id2meta: Option<&Id2Meta>) -> Result<Tokenizer, StageError> {
    let catalogue = id2meta.into_iter().flat_map(|all| all.records()).filter(|r| r.has_valid_tid());
    let named = catalogue.map(|r| r.clean_words().flat_map(str::split_whitespace).collect());
    let written = files.iter().flat_map(|f| &f.samples).flat_map(|s| s.output.lines());
    let tids = named.chain(written.map(|line| line.split_whitespace().collect())).collect();
    let names = prefixes::vocabulary(&tids);
    of_names(names.iter().map(String::as_str))
}

fn of_names<'a>(names: impl IntoIterator<Item = &'a str>) -> Result<Tokenizer, StageError> {
    let special = [special::WORDS_PAD, special::WORDS_START, special::WORDS_END, special::WORDS_UNKNOWN];
    Ok(Tokenizer::of_words(names.into_iter().filter(|name| !special.contains(name)))?)
}

/// What became of the samples.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    pub samples: u64,
    pub tokens: u64,
    pub learned: u64,
    /// Longer than `max_length`, and cut.
    pub cut: u64,
    /// Without a response, and left out.
    pub silent: u64,
    /// With a response for which the template left no room, and left out.
    pub crowded: u64,
    /// Learned tokens that stand for words which the tokenizer does not know.
    pub unknown: u64,
}

impl Counts {
    fn add(&mut self, other: Self) {
        self.samples += other.samples;
        self.tokens += other.tokens;
        self.learned += other.learned;
        self.cut += other.cut;
        self.silent += other.silent;
        self.crowded += other.crowded;
        self.unknown += other.unknown;
    }

    pub fn facts(self) -> BTreeMap<&'static str, u64> {
        BTreeMap::from([
            ("samples", self.samples),
            ("tokens", self.tokens),
            ("learned_tokens", self.learned),
            ("samples_cut", self.cut),
            ("samples_without_response", self.silent),
        ])
    }
}

/// Tokenises all files.
///
/// # Errors
/// No sample has anything to learn.
pub fn corpus(
    params: &Params,
    files: &[File],
    layout: &Layout,
    cx: &mut StageContext,
) -> Result<(Corpus, Counts), StageError> {
    let mut corpus = Corpus::default();
    let mut all = Counts::default();
    for file in files {
        let (samples, counts) = tokenise(params, &file.samples, layout)?;
        let weight = if file.weight == 1.0 { String::new() } else { format!(" (weight {})", file.weight) };
        let mut line = format!(
            "`{}`{weight}: {} samples, {} tokens, {} of them learned",
            file.port, counts.samples, counts.tokens, counts.learned
        );
        if counts.cut > 0 {
            line += &format!("; {} samples were longer than {} tokens and cut", counts.cut, params.max_length);
        }
        if counts.silent > 0 {
            line += &format!("; {} without a response left out", counts.silent);
        }
        if counts.crowded > 0 {
            line += &format!("; {} without room for their response left out", counts.crowded);
        }
        if counts.unknown > 0 {
            line += &format!("; {} of the learned tokens are words that the tokenizer does not know", counts.unknown);
        }
        if counts.cut + counts.silent + counts.crowded + counts.unknown > 0 {
            cx.warn(line)
        } else {
            cx.info(line)
        }
        if 2 * counts.unknown > counts.learned {
            let message = format!(
                "{} of {} learned tokens are words that the model's tokenizer does not know",
                counts.unknown, counts.learned
            );
            return Err(StageError::input(&file.path, message)
                .help("the model was made for another catalogue: train it on this one's samples from scratch"));
        }
        if samples.is_empty() && counts.crowded > 0 {
            let message = format!("no response has room within {} tokens", params.max_length);
            return Err(StageError::input(&file.path, message).help("raise `max_length`"));
        }
        if samples.is_empty() {
            return Err(StageError::input(&file.path, "no sample has a response to learn")
                .help("`output` is empty everywhere; `train_on_prompt: true` learns the prompts"));
        }
        all.add(counts);
        corpus.sources.push(Source { samples, weight: file.weight });
    }
    if corpus.epoch_len() == 0 {
        return Err(StageError::params("with these `weights` an epoch takes no sample"));
    }
    Ok((corpus, all))
}

/// Tokenises samples, and leaves out those that teach nothing.
///
/// # Errors
/// The tokenizer cannot take a text.
pub fn tokenise(params: &Params, samples: &[Sample], layout: &Layout) -> Result<(Vec<Tokens>, Counts), StageError> {
    let laid: Vec<_> = samples.par_iter().map(|s| layout.sample(s)).collect::<Result<_, _>>()?;
    let unknown = layout.tokenizer().id(special::WORDS_UNKNOWN).filter(|_| layout.tokenizer().is_of_words());
    let mut counts = Counts::default();
    let mut kept = Vec::with_capacity(samples.len());
    for (sample, laid) in samples.iter().zip(laid) {
        counts.cut += u64::from(laid.cut);
        let learned_from = if params.train_on_prompt { 1 } else { laid.learned_from.max(1) };
        let tokens = Tokens { tokens: laid.tokens, learned_from };
        if sample.output.is_empty() && !params.train_on_prompt {
            counts.silent += 1;
            continue;
        }
        if tokens.targets() == 0 {
            counts.crowded += 1;
            continue;
        }
        let learned = &tokens.tokens[learned_from..];
        counts.unknown += learned.iter().filter(|token| Some(**token) == unknown).count() as u64;
        counts.samples += 1;
        counts.tokens += tokens.tokens.len() as u64;
        counts.learned += tokens.targets() as u64;
        kept.push(tokens);
    }
    Ok((kept, counts))
}
