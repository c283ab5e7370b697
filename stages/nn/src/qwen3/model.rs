//! The model as others see it: prompts are read, beams go forward, and the output head says what may follow. What it
//! computes with is chosen when it is loaded.

use std::{ops::Range, path::Path};

use super::{
    Config, DeviceMemory, Place,
    kv::{Branches, BranchesKv, OTHERS, PackedPrompts, Room, Segment},
    packed::Packed,
    tensors::Tensors,
    weights::Weights,
};
use crate::{
    Error,
    cpu::ops::{self, LogSumExp},
};

/// A Qwen3 ready to compute.
pub struct Qwen3 {
    config: Config,
    network: Network,
}

enum Network {
    Packed(Box<Packed>),
    Tensors(Box<Tensors>),
}

/// Beams of a prompt to go further, by one token or several.
#[derive(Clone, Copy)]
pub struct Step<'a> {
    /// Which of the prompts, in the order in which they were read.
    pub prompt: usize,
    /// The tokens to be computed.
    pub tokens: &'a [u32],
    /// The slots on the way to each token. They may be those of earlier tokens of this very step: that is how a beam
    /// takes several tokens at once.
    pub paths: &'a [Vec<u32>],
}

/// Which rows' hidden states are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// Of every token.
    All,
    /// Of the last token of every prompt.
    Last,
}

/// The tokens that go through the network together.
#[derive(Default)]
pub struct Batch {
    pub tokens: Vec<u32>,
    /// Where each token stands in its text.
    pub positions: Vec<usize>,
    /// Which tokens belong to each prompt, or to the beams of each prompt.
    pub rows: Vec<Range<usize>>,
}

impl Batch {
    fn add(&mut self, tokens: &[u32], positions: impl Iterator<Item = usize>) {
        self.rows.push(self.tokens.len()..self.tokens.len() + tokens.len());
        self.tokens.extend_from_slice(tokens);
        self.positions.extend(positions);
    }
}

impl Qwen3 {
    /// Loads a model folder for the CPU: maps its weights and packs them. Runs on the current rayon pool.
    ///
    /// # Errors
    /// As [`Config::load`] and [`Weights::open`].
    pub fn load(folder: &Path) -> Result<Self, Error> {
        Self::load_on(folder, Place::Cpu)
    }

    /// Loads a model folder to compute in `place`.
    ///
    /// # Errors
    /// As [`Qwen3::load`]; the weights have no output head; there is no such device, or its memory is too small.
    pub fn load_on(folder: &Path, place: Place) -> Result<Self, Error> {
        Self::open(folder, place, true)
    }

    /// Loads a model folder without its output head, which an encoder never needs.
    ///
    /// # Errors
    /// As [`Qwen3::load_on`].
    pub fn load_encoder(folder: &Path, place: Place) -> Result<Self, Error> {
        Self::open(folder, place, false)
    }

    fn open(folder: &Path, place: Place, with_head: bool) -> Result<Self, Error> {
        let config = Config::load(folder)?;
        let weights = Weights::open(folder, &config)?;
        if with_head && !weights.has_head(&config) {
            return Err(Error::model(
                folder,
                "the weights have no output head (`lm_head.weight`), and can write nothing",
            )
            .help("an encoder is for `similarity`; take a language model's folder here"));
        }
        let network = match place.device()? {
            None => Network::Packed(Box::new(Packed::load(config.clone(), &weights, with_head)?)),
            Some((device, dtype)) => {
                Network::Tensors(Box::new(Tensors::load(config.clone(), &weights, with_head, device, dtype)?))
            }
        };
        Ok(Self { config, network })
    }

    /// Lets a device compute in parts so small that a test of a few tokens has several.
    #[doc(hidden)]
    pub fn in_small_parts(mut self) -> Self {
        if let Network::Tensors(network) = &mut self.network {
            network.in_small_parts();
        }
        self
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Whether tensors on a device compute it: one thread hands them over, thousands of rows together.
    pub fn is_on_device(&self) -> bool {
        matches!(self.network, Network::Tensors(_))
    }

    /// Reads what prompts begin with; returns it and the hidden state of its last token, after the last norm.
    ///
    /// # Errors
    /// As [`Qwen3::read`].
    pub fn segment(&self, tokens: &[u32], threads: usize) -> Result<(Segment, Vec<f32>), Error> {
        let mut branches = self.branches(None, Room::of(&[tokens], 0))?;
        let hidden = self.read(&mut branches, &[tokens], Wanted::Last, threads)?;
        let segment = match branches.kv {
            BranchesKv::Packed(mut kv) => Segment::packed(tokens.len(), kv.prompts.swap_remove(0).own),
            BranchesKv::Tensors(store) => Segment::tensors(tokens.len(), store.into_first()?),
        };
        Ok((segment, hidden))
    }

    /// The memory of the device that computes it; `None` on the CPU.
    pub fn device_memory(&self) -> Option<DeviceMemory> {
        match &self.network {
            Network::Packed(_) => None,
            Network::Tensors(network) => network.memory(),
        }
    }

    /// Takes memory for prompts behind `prefix` that are to be read.
    ///
    /// # Errors
    /// A device has not so much.
    pub fn branches<'a>(&self, prefix: Option<&'a Segment>, room: Room) -> Result<Branches<'a>, Error> {
        let kv = match &self.network {
            Network::Packed(_) => {
                BranchesKv::Packed(PackedPrompts { prompts: Vec::with_capacity(room.prompts), slots: room.slots })
            }
            Network::Tensors(network) => BranchesKv::Tensors(network.store(room)?),
        };
        Ok(Branches { prefix, kv })
    }

    /// Reads prompts into `branches`, behind those that are there; returns the hidden states that are `wanted` (`[rows,
    /// hidden]`, after the last norm, in the order of prompts and tokens).
    ///
    /// # Errors
    /// A prompt is empty or longer than the model's positions, or has a token that the model has not; what is computed
    /// is no number; a device fails.
    pub fn read(
        &self,
        branches: &mut Branches,
        prompts: &[&[u32]],
        wanted: Wanted,
        threads: usize,
    ) -> Result<Vec<f32>, Error> {
        let mut batch = Batch::default();
        let before = branches.prefix_length();
        for tokens in prompts {
            self.check(tokens, before)?;
            batch.add(tokens, before..before + tokens.len());
        }
        if prompts.is_empty() {
            return Ok(Vec::new());
        }
        let last: Vec<usize> = batch.rows.iter().map(|r| r.end - 1).collect();
        let kept = (wanted == Wanted::Last).then_some(last.as_slice());
        finite(match (&self.network, &mut branches.kv) {
            (Network::Packed(network), BranchesKv::Packed(kv)) => {
                network.read(branches.prefix, kv, &batch, kept, threads)
            }
            (Network::Tensors(network), BranchesKv::Tensors(store)) => {
                network.read(branches.prefix, store, &batch, kept)?
            }
            _ => unreachable!("{OTHERS}"),
        })
    }

    /// Takes beams further, one [`Step`] for a prompt; returns the new tokens' hidden states (`[rows, hidden]`, after the
    /// last norm). The new tokens take the next slots of their prompts, in order.
    ///
    /// # Errors
    /// As [`Qwen3::read`].
    pub fn step(&self, branches: &mut Branches, steps: &[Step], threads: usize) -> Result<Vec<f32>, Error> {
        let mut batch = Batch::default();
        for step in steps {
            let before = branches.prompt_length(step.prompt);
            for (token, path) in step.tokens.iter().zip(step.paths) {
                self.check(std::slice::from_ref(token), before + path.len())?;
            }
            batch.add(step.tokens, step.paths.iter().map(|path| before + path.len()));
        }
        if batch.tokens.is_empty() {
            return Ok(Vec::new());
        }
        finite(match (&self.network, &mut branches.kv) {
            (Network::Packed(network), BranchesKv::Packed(kv)) => {
                network.step(branches.prefix, kv, steps, &batch, threads)
            }
            (Network::Tensors(network), BranchesKv::Tensors(store)) => {
                network.step(branches.prefix, store, steps, &batch)?
            }
            _ => unreachable!("{OTHERS}"),
        })
    }

    /// Hands out the logits of `hidden`'s rows in chunks of columns, always the same chunks in the same order:
    /// `visit(row, first token, logits)`.
    ///
    /// # Errors
    /// The model is an encoder without a head; a device fails.
    pub fn visit_logits(
        &self,
        hidden: &[f32],
        threads: usize,
        visit: impl FnMut(usize, usize, &[f32]),
    ) -> Result<(), Error> {
        self.check_head()?;
        match &self.network {
            Network::Packed(network) => network.visit_logits(hidden, threads, visit),
            Network::Tensors(network) => network.visit_logits(hidden, visit)?,
        }
        Ok(())
    }

    /// All logits, `[rows, vocabulary]`.
    ///
    /// # Errors
    /// As [`Qwen3::visit_logits`].
    pub fn logits(&self, hidden: &[f32], threads: usize) -> Result<Vec<f32>, Error> {
        let vocabulary = self.config.vocab_size;
        let mut all = vec![0.0; hidden.len() / self.config.hidden_size * vocabulary];
        self.visit_logits(hidden, threads, |row, first, logits| {
            let start = row * vocabulary + first;
            all[start..start + logits.len()].copy_from_slice(logits);
        })?;
        Ok(all)
    }

    /// For every row of `hidden` the token with the largest logit.
    ///
    /// # Errors
    /// As [`Qwen3::visit_logits`].
    pub fn likeliest(&self, hidden: &[f32], threads: usize) -> Result<Vec<u32>, Error> {
        if let Network::Tensors(network) = &self.network {
            self.check_head()?;
            return network.likeliest(hidden);
        }
        let mut best = vec![(f32::NEG_INFINITY, 0u32); hidden.len() / self.config.hidden_size];
        self.visit_logits(hidden, threads, |row, first, logits| {
            let max = ops::max(logits);
            if max > best[row].0 {
                let at = logits.iter().position(|l| *l == max).unwrap_or(0);
                best[row] = (max, (first + at) as u32);
            }
        })?;
        Ok(best.into_iter().map(|(_, token)| token).collect())
    }

    /// For every row of `hidden`, the log-probabilities of its `wanted` tokens (ascending) among the whole vocabulary.
    ///
    /// # Errors
    /// As [`Qwen3::visit_logits`].
    pub fn log_probabilities(&self, hidden: &[f32], wanted: &[&[u32]], threads: usize) -> Result<Vec<Vec<f32>>, Error> {
        if let Network::Tensors(network) = &self.network {
            self.check_head()?;
            return network.log_probabilities(hidden, wanted);
        }
        let mut found: Vec<Vec<f32>> = wanted.iter().map(|tokens| Vec::with_capacity(tokens.len())).collect();
        let mut sums = vec![LogSumExp::default(); wanted.len()];
        self.visit_logits(hidden, threads, |row, first, logits| {
            sums[row].add(logits);
            let found = &mut found[row];
            let end = first + logits.len();
            let next = wanted[row][found.len()..].iter().map(|t| *t as usize).take_while(|t| *t < end);
            found.extend(next.map(|token| logits[token - first]));
        })?;
        for (found, sum) in found.iter_mut().zip(&sums) {
            let sum = sum.value();
            found.iter_mut().for_each(|logit| *logit -= sum);
        }
        Ok(found)
    }

    /// For every row of `hidden`, the logits of its `wanted` tokens; summed in another order than
    /// [`Qwen3::visit_logits`].
    ///
    /// # Errors
    /// As [`Qwen3::visit_logits`].
    pub fn logits_of(&self, hidden: &[f32], wanted: &[&[u32]]) -> Result<Vec<Vec<f32>>, Error> {
        self.check_head()?;
        match &self.network {
            Network::Packed(network) => {
                let rows = hidden.chunks_exact(self.config.hidden_size);
                Ok(rows.zip(wanted).map(|(row, tokens)| network.logits_of(row, tokens)).collect())
            }
            Network::Tensors(network) => network.logits_of(hidden, wanted),
        }
    }

    fn check_head(&self) -> Result<(), Error> {
        let there = match &self.network {
            Network::Packed(network) => network.has_head(),
            Network::Tensors(network) => network.has_head(),
        };
        if there {
            return Ok(());
        }
        Err(Error::argument("the model has no output head, and cannot generate")
            .help("it is an encoder; use it in `similarity`"))
    }

    fn check(&self, tokens: &[u32], before: usize) -> Result<(), Error> {
        if tokens.is_empty() {
            return Err(Error::argument("a prompt has no tokens"));
        }
        if let Some(token) = tokens.iter().find(|t| **t as usize >= self.config.vocab_size) {
            let size = self.config.vocab_size;
            return Err(Error::argument(format!("token {token} is not among the model's {size}"))
                .help("tokenizer.json and config.json are of different models"));
        }
        let (length, limit) = (before + tokens.len(), self.config.max_positions);
        if length > limit {
            return Err(Error::argument(format!("a prompt of {length} tokens, and the model has {limit} positions"))
                .help("shorten the histories"));
        }
        Ok(())
    }
}

/// NaN would else pass for a low score.
fn finite(hidden: Vec<f32>) -> Result<Vec<f32>, Error> {
    if hidden.iter().all(|x| x.is_finite()) { Ok(hidden) } else { Err(Error::NotFinite) }
}
