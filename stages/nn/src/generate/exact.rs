//! The score of every TID of a catalogue, without any search: what beam search approximates, and is tested against.
//! Every TID is read after the prompt like a prompt of its own.

use rustc_hash::FxHashMap;

use super::{Generator, Normalize, catalogue::check_tokens};
use crate::{
    Error,
    cpu::ops::LogSumExp,
    qwen3::{Room, Segment, Wanted},
};

/// TIDs that are read together.
const TOGETHER: usize = 32;

/// For every prompt the score of each of `entries`, in their order: the sum of log-probabilities /
/// length^`length_penalty`. `prefix` stands before every prompt.
///
/// # Errors
/// As [`super::Catalogue::search`].
pub fn exact(
    generator: &Generator,
    prefix: &[u32],
    prompts: &[&[u32]],
    entries: &[Vec<u32>],
    normalize: Normalize,
    length_penalty: f32,
) -> Result<Vec<Vec<f32>>, Error> {
    check_tokens(entries.iter().flatten().copied().max().unwrap_or(0), generator.model)?;
    let mut allowed: FxHashMap<&[u32], Vec<u32>> = FxHashMap::default();
    for entry in entries {
        for depth in 0..entry.len() {
            allowed.entry(&entry[..depth]).or_default().push(entry[depth]);
        }
    }
    for tokens in allowed.values_mut() {
        tokens.sort_unstable();
        tokens.dedup();
    }
    let tokens = |prompt: &&[u32]| prefix.len() + prompt.len();
    generator.share_out(prompts, tokens, |prompts, threads| {
        prompts
            .iter()
            .map(|prompt| {
                let whole = [prefix, prompt].concat();
                let task = Task { generator, allowed: &allowed, normalize, threads };
                let mut scores = task.scores(&whole, entries)?;
                for (score, entry) in scores.iter_mut().zip(entries).filter(|_| length_penalty != 0.0) {
                    *score /= (entry.len() as f32).powf(length_penalty);
                }
                Ok(scores)
            })
            .collect()
    })
}

struct Task<'a> {
    generator: &'a Generator<'a>,
    /// What may follow each beginning.
    allowed: &'a FxHashMap<&'a [u32], Vec<u32>>,
    normalize: Normalize,
    threads: usize,
}

impl Task<'_> {
    fn scores(&self, prompt: &[u32], entries: &[Vec<u32>]) -> Result<Vec<f32>, Error> {
        let (prompt, first) = self.generator.model.segment(prompt, self.threads)?;
        let mut scores = Vec::with_capacity(entries.len());
        for entries in entries.chunks(TOGETHER) {
            scores.extend(self.some(&prompt, &first, entries)?);
        }
        Ok(scores)
    }

    fn some(&self, prompt: &Segment, first: &[f32], entries: &[Vec<u32>]) -> Result<Vec<f32>, Error> {
        let model = self.generator.model;
        let width = model.config().hidden_size;
        let longer: Vec<&[u32]> = entries.iter().filter(|e| e.len() > 1).map(|e| &e[..e.len() - 1]).collect();
        let mut branches = model.branches(Some(prompt), Room::of(&longer, 0))?;
        let rest = model.read(&mut branches, &longer, Wanted::All, self.threads)?;
        let mut rest = rest.chunks_exact(width);
        let (mut hidden, mut targets) = (Vec::new(), Vec::new());
        for (index, entry) in entries.iter().enumerate() {
            hidden.extend_from_slice(first);
            rest.by_ref().take(entry.len() - 1).for_each(|row| hidden.extend_from_slice(row));
            targets.extend((0..entry.len()).map(|depth| (index, depth)));
        }
        let mut scores = vec![0.0; entries.len()];
        match self.normalize {
            Normalize::Full => {
                let wanted: Vec<&[u32]> =
                    targets.iter().map(|&(entry, depth)| &entries[entry][depth..=depth]).collect();
                let found = self.generator.log_probabilities(&hidden, &wanted, self.threads)?;
                targets.iter().zip(found).for_each(|(&(entry, _), found)| scores[entry] += found[0]);
            }
            Normalize::Allowed => {
                let allowed = |&(entry, depth): &(usize, usize)| self.allowed[&entries[entry][..depth]].as_slice();
                let wanted: Vec<&[u32]> = targets.iter().map(allowed).collect();
                let found = model.logits_of(&hidden, &wanted)?;
                for ((&(entry, depth), allowed), logits) in targets.iter().zip(wanted).zip(found) {
                    let mut sum = LogSumExp::default();
                    sum.add(&logits);
                    let place = allowed.partition_point(|token| *token < entries[entry][depth]);
                    scores[entry] += logits[place] - sum.value();
                }
            }
        }
        Ok(scores)
    }
}
