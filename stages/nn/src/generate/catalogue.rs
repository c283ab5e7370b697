//! Beam search over a catalogue: only what the trie of its TIDs allows, each TID to its end.
//!
//! All beams of a prompt are equally long, and the best `beams` of their continuations go on. Entries that end go into
//! the list of results, which keeps the best `beams`. With [`Normalize::Full`] a step costs what it costs unconstrained
//! beam search (the sum over the whole vocabulary); as soon as every beam can end in one entry only, what is left of
//! all of them is computed in one pass. With [`Normalize::Allowed`] a token that is the only one allowed costs nothing
//! until a choice behind it has to be made.

use super::{Generator, LeftOut, Node, Trie, memory};
use crate::{
    Error,
    cpu::ops,
    qwen3::{Branches, Qwen3, Step},
};

/// What a TID's score is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Normalize {
    /// The log-probability that the model gives it: what unconstrained beam search would score it with.
    Full,
    /// At every token the probability among the tokens that the catalogue allows there: the probability of the TID,
    /// given that one of the catalogue's is written in this way. Only these tokens are computed. What a prompt leaves
    /// out still counts as allowed, so that scores do not depend on it.
    Allowed,
}

/// How a catalogue is searched.
pub struct Catalogue<'t> {
    pub trie: &'t Trie,
    pub beams: usize,
    pub normalize: Normalize,
    /// The score is the sum of log-probabilities / length^this; with 0 it is the log-probability itself.
    pub length_penalty: f32,
}

/// A prompt, and what must not be among its results.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'a> {
    pub tokens: &'a [u32],
    /// Entries of the trie.
    pub left_out: &'a [u32],
}

/// A result: an entry of the trie, and its score.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Found {
    pub entry: u32,
    pub score: f32,
}

/// A beam that has not ended.
#[derive(Clone)]
struct Beam {
    node: Node,
    sum: f32,
    /// The slots of the tokens that have been computed.
    path: Vec<u32>,
    /// Tokens that have been chosen and not computed.
    pending: Vec<u32>,
}

/// One prompt's search.
struct Search {
    left_out: LeftOut,
    beams: Vec<Beam>,
    found: Vec<Found>,
    /// Tokens of every beam.
    length: usize,
}

/// The log-probabilities of the tokens that may follow a beam; `None` where there is one and nothing to be computed.
type Continuations = Vec<Option<Vec<f32>>>;

impl Catalogue<'_> {
    /// For every prompt its best entries (`beams` of them, or all that are not left out), best first.
    ///
    /// # Errors
    /// No beams; a TID with tokens that the model has not; as [`crate::qwen3::Qwen3::read`]; a model without a head.
    pub fn search(&self, generator: &Generator, asked: &[Asked]) -> Result<Vec<Vec<Found>>, Error> {
        if self.beams == 0 {
            return Err(Error::argument("beam search needs at least one beam"));
        }
        check_tokens(self.trie.largest_token(), generator.model)?;
        let slots = memory::catalogue_slots(self.trie, self.beams);
        let tokens = |asked: &Asked| asked.tokens.len() + slots;
        generator.share_out(asked, tokens, |asked, threads| self.batch(generator, asked, slots, threads))
    }

    fn batch(
        &self,
        generator: &Generator,
        asked: &[Asked],
        slots: usize,
        threads: usize,
    ) -> Result<Vec<Vec<Found>>, Error> {
        let prompts: Vec<&[u32]> = asked.iter().map(|a| a.tokens).collect();
        let (mut branches, hidden) = generator.read(&prompts, slots, threads)?;
        let begin = |asked: &Asked| {
            let root = Beam { node: self.trie.root(), sum: 0.0, path: Vec::new(), pending: Vec::new() };
            let left_out = LeftOut::new(self.trie, asked.left_out);
            let all_left_out = left_out.covers(self.trie, root.node);
            let beams = if all_left_out { Vec::new() } else { vec![root] };
            Search { left_out, beams, found: Vec::new(), length: 0 }
        };
        let mut searches: Vec<Search> = asked.iter().map(begin).collect();
        let mut hidden = Some(hidden);
        while searches.iter().any(|s| !s.beams.is_empty()) {
            if hidden.is_none() && self.normalize == Normalize::Full {
                self.finish_what_is_decided(generator, &mut branches, &mut searches, threads)?;
            }
            let all = match hidden.take() {
                Some(first) => self.score_first(generator, &searches, &first, threads)?,
                None => self.score(generator, &mut branches, &mut searches, threads)?,
            };
            let mut all = all.into_iter();
            for search in &mut searches {
                let continuations: Continuations = all.by_ref().take(search.beams.len()).collect();
                self.choose(search, continuations);
            }
        }
        Ok(searches.into_iter().map(|s| s.found).collect())
    }

    /// The continuations of the roots, from the prompts' last hidden states.
    fn score_first(
        &self,
        generator: &Generator,
        searches: &[Search],
        hidden: &[f32],
        threads: usize,
    ) -> Result<Continuations, Error> {
        let width = generator.model.config().hidden_size;
        let rows = hidden.chunks_exact(width).zip(searches).filter(|(_, s)| !s.beams.is_empty());
        let hidden: Vec<f32> = rows.flat_map(|(row, _)| row).copied().collect();
        let wanted = vec![self.trie.tokens(self.trie.root()); hidden.len() / width];
        Ok(self.log_probabilities(generator, &hidden, &wanted, threads)?.into_iter().map(Some).collect())
    }

    /// The continuations of all beams; computes what is pending where that is needed.
    fn score(
        &self,
        generator: &Generator,
        branches: &mut Branches,
        searches: &mut [Search],
        threads: usize,
    ) -> Result<Continuations, Error> {
        let needed = |beam: &Beam| self.normalize == Normalize::Full || self.trie.tokens(beam.node).len() > 1;
        let mut feeds: Vec<Feed> = searches.iter().map(|_| Feed::default()).collect();
        let mut wanted = Vec::new();
        let mut last_rows = Vec::new();
        let mut row = 0;
        let mut is_scored = Vec::new();
        for (which, (search, feed)) in searches.iter_mut().zip(&mut feeds).enumerate() {
            let mut slot = branches.slots(which) as u32;
            for beam in &mut search.beams {
                is_scored.push(needed(beam));
                if !needed(beam) {
                    continue;
                }
                for token in std::mem::take(&mut beam.pending) {
                    feed.push(token, beam.path.clone());
                    beam.path.push(slot);
                    (slot, row) = (slot + 1, row + 1);
                }
                last_rows.push(row - 1);
                wanted.push(self.trie.tokens(beam.node));
            }
        }
        let hidden = run(generator, branches, &feeds, threads)?;
        let width = generator.model.config().hidden_size;
        let hidden: Vec<f32> =
            last_rows.iter().flat_map(|row| &hidden[row * width..(row + 1) * width]).copied().collect();
        let mut scored = self.log_probabilities(generator, &hidden, &wanted, threads)?.into_iter();
        Ok(is_scored.into_iter().map(|is_scored| if is_scored { scored.next() } else { None }).collect())
    }

    fn log_probabilities(
        &self,
        generator: &Generator,
        hidden: &[f32],
        wanted: &[&[u32]],
        threads: usize,
    ) -> Result<Vec<Vec<f32>>, Error> {
        if self.normalize == Normalize::Full {
            return generator.log_probabilities(hidden, wanted, threads);
        }
        let logits = generator.model.logits_of(hidden, wanted)?;
        Ok(logits.into_iter().map(among_themselves).collect())
    }

    /// Where every beam of a prompt can end in one entry only, nothing is left to choose: computes the rest of all of
    /// them in one pass, and ends them.
    fn finish_what_is_decided(
        &self,
        generator: &Generator,
        branches: &mut Branches,
        searches: &mut [Search],
        threads: usize,
    ) -> Result<(), Error> {
        let mut feeds: Vec<Feed> = searches.iter().map(|_| Feed::default()).collect();
        let mut tails = Vec::new();
        for (which, (search, feed)) in searches.iter().zip(&mut feeds).enumerate() {
            let ways: Option<Vec<_>> = search.beams.iter().map(|b| self.trie.only_way_on(b.node)).collect();
            let Some(ways) = ways else { continue };
            let mut slot = branches.slots(which) as u32;
            for (beam, (tokens, entry)) in search.beams.iter().zip(ways) {
                let mut path = beam.path.clone();
                let before_last = &tokens[..tokens.len().saturating_sub(1)];
                for token in beam.pending.iter().chain(before_last) {
                    feed.push(*token, path.clone());
                    path.push(slot);
                    slot += 1;
                }
                debug_assert_eq!(beam.pending.len(), 1);
                tails.push((which, beam.sum, tokens, entry));
            }
        }
        if tails.is_empty() {
            return Ok(());
        }
        let hidden = run(generator, branches, &feeds, threads)?;
        let wanted: Vec<&[u32]> = tails.iter().flat_map(|(_, _, tokens, _)| tokens.chunks(1)).collect();
        let mut scored = generator.log_probabilities(&hidden, &wanted, threads)?.into_iter().flatten();
        for (which, mut sum, tokens, entry) in tails {
            scored.by_ref().take(tokens.len()).for_each(|log_probability| sum += log_probability);
            let search = &mut searches[which];
            search.beams.clear();
            search.found.push(Found { entry, score: self.divided(sum, search.length + tokens.len()) });
        }
        searches.iter_mut().for_each(|search| self.keep_best(search));
        Ok(())
    }

    /// Takes one prompt's beams a token further.
    fn choose(&self, search: &mut Search, continuations: Continuations) {
        let beams = std::mem::take(&mut search.beams);
        search.length += 1;
        let mut candidates: Vec<(f32, usize, usize)> = Vec::new();
        for (index, (beam, scores)) in beams.iter().zip(continuations).enumerate() {
            for child in 0..self.trie.tokens(beam.node).len() {
                let sum = beam.sum + scores.as_ref().map_or(0.0, |scores| scores[child]);
                let node = self.trie.child(beam.node, child);
                if search.left_out.covers(self.trie, node) {
                    continue;
                }
                if let Some(entry) = self.trie.entry(node).filter(|_| !search.left_out.holds(self.trie, node)) {
                    search.found.push(Found { entry, score: self.divided(sum, search.length) });
                }
                if !self.trie.tokens(node).is_empty() {
                    candidates.push((sum, index, child));
                }
            }
        }
        self.keep_best(search);
        // Breadth-first numbers: by beam and child is by beam and token.
        let order = |a: &(f32, usize, usize), b: &(f32, usize, usize)| {
            b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)).then(a.2.cmp(&b.2))
        };
        if candidates.len() > self.beams {
            candidates.select_nth_unstable_by(self.beams - 1, order);
            candidates.truncate(self.beams);
        }
        candidates.sort_unstable_by(order);
        for (sum, index, child) in candidates {
            let from = &beams[index];
            let mut pending = from.pending.clone();
            pending.push(self.trie.tokens(from.node)[child]);
            search.beams.push(Beam { node: self.trie.child(from.node, child), sum, path: from.path.clone(), pending });
        }
        if let (Some(worst), Some(best)) = (search.found.get(self.beams - 1), search.beams.first())
            && self.best_possible(best.sum, search.length) <= worst.score
        {
            search.beams.clear();
        }
    }

    fn keep_best(&self, search: &mut Search) {
        search.found.sort_by(|a, b| b.score.total_cmp(&a.score).then(a.entry.cmp(&b.entry)));
        search.found.truncate(self.beams);
    }

    fn divided(&self, sum: f32, length: usize) -> f32 {
        if self.length_penalty == 0.0 { sum } else { sum / (length as f32).powf(self.length_penalty) }
    }

    /// The best score that a beam of this length can still end with, were all its further tokens certain.
    fn best_possible(&self, sum: f32, length: usize) -> f32 {
        self.divided(sum, length + 1).max(self.divided(sum, self.trie.longest()))
    }
}

/// Tokens of one prompt's beams to be computed, and the path before each.
#[derive(Default)]
struct Feed {
    tokens: Vec<u32>,
    paths: Vec<Vec<u32>>,
}

impl Feed {
    fn push(&mut self, token: u32, path: Vec<u32>) {
        self.tokens.push(token);
        self.paths.push(path);
    }
}

fn run(generator: &Generator, branches: &mut Branches, feeds: &[Feed], threads: usize) -> Result<Vec<f32>, Error> {
    let all = feeds.iter().enumerate();
    let steps = all.map(|(prompt, Feed { tokens, paths })| Step { prompt, tokens, paths });
    let steps: Vec<Step> = steps.filter(|step| !step.tokens.is_empty()).collect();
    generator.advance(branches, &steps, threads)
}

/// From the logits of some tokens to their log-probabilities among themselves.
fn among_themselves(mut logits: Vec<f32>) -> Vec<f32> {
    let (max, sum) = ops::max_and_sum_exp(&logits);
    let all = max + sum.ln();
    logits.iter_mut().for_each(|logit| *logit -= all);
    logits
}

pub(super) fn check_tokens(largest: u32, model: &Qwen3) -> Result<(), Error> {
    let size = model.config().vocab_size;
    if largest as usize >= size {
        return Err(Error::argument(format!("a TID has token {largest}, which is not among the model's {size}"))
            .help("tokenizer.json and config.json are of different models"));
    }
    Ok(())
}
