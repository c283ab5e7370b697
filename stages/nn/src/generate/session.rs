//! What all ways of decoding share: prompts that are read, their beams going forward, work shared out over threads.

use std::ops::Range;

use rayon::prelude::*;

use super::memory;
use crate::{
    Error,
    parts::parts,
    qwen3::{Branches, Qwen3, Room, Segment, Step, Wanted},
};

/// Rows (prompt tokens, or tokens of beams) that go through the network together: enough for the products to run at
/// full speed, few enough for what lies between them to stay in the cache, and a bound on memory.
pub const ROWS_AT_ONCE: usize = 256;
/// The same for a GPU, which small products leave idle.
pub const ROWS_ON_DEVICE: usize = 4096;
/// Prompts that a GPU has in work at most: more of them bring little, and a kill loses as many.
pub const PROMPTS_ON_DEVICE: usize = 128;

/// A model that generates, after a beginning that all prompts share.
pub struct Generator<'m> {
    pub(super) model: &'m Qwen3,
    prefix: Option<Segment>,
    /// Prompts that one thread has in work.
    batch: usize,
    rows_at_once: usize,
    threads: usize,
}

impl<'m> Generator<'m> {
    /// Without a shared beginning, 8 prompts at once on each of `threads` threads of the current rayon pool; on a GPU as
    /// many as half of its free memory holds, at most [`PROMPTS_ON_DEVICE`], which one thread hands to it.
    pub fn new(model: &'m Qwen3, threads: usize) -> Self {
        let (batch, rows_at_once, threads) = match model.is_on_device() {
            true => (PROMPTS_ON_DEVICE, ROWS_ON_DEVICE, 1),
            false => (8, ROWS_AT_ONCE, threads.max(1)),
        };
        Self { model, prefix: None, batch, rows_at_once, threads }
    }

    /// Computes `tokens` once; all prompts that are given from now on stand behind it.
    ///
    /// # Errors
    /// As [`Qwen3::read`].
    pub fn with_prefix(mut self, tokens: &[u32]) -> Result<Self, Error> {
        self.prefix = match tokens {
            [] => None,
            _ => Some(self.model.segment(tokens, self.threads)?.0),
        };
        Ok(self)
    }

    /// Prompts that one thread has in work; more of them cost memory, and change no result on the CPU.
    pub fn with_batch(mut self, batch: usize) -> Self {
        self.batch = batch.max(1);
        self
    }

    pub fn model(&self) -> &'m Qwen3 {
        self.model
    }

    /// Calls `decode(prompts, threads)` for small batches, and puts the results in the order of the prompts; `tokens` are
    /// those of a prompt behind the prefix, and those that it may generate.
    pub(super) fn share_out<P: Sync, R: Send>(
        &self,
        prompts: &[P],
        tokens: impl Fn(&P) -> usize,
        decode: impl Fn(&[P], usize) -> Result<Vec<R>, Error> + Sync,
    ) -> Result<Vec<R>, Error> {
        if self.threads == 1 || prompts.len() < self.threads {
            let batches = prompts.chunks(self.batch_of(prompts, tokens));
            let parts: Result<Vec<_>, _> = batches.map(|batch| decode(batch, self.threads)).collect();
            return Ok(parts?.into_iter().flatten().collect());
        }
        let batches = shrinking(prompts.len(), self.batch, self.threads);
        let decode = |batch: Range<usize>| Ok::<_, Error>((batch.start, decode(&prompts[batch], 1)?));
        let mut parts: Vec<(usize, Vec<R>)> = batches.par_bridge().map(decode).collect::<Result<_, _>>()?;
        parts.sort_unstable_by_key(|(start, _)| *start);
        Ok(parts.into_iter().flat_map(|(_, results)| results).collect())
    }

    /// How many of the prompts are in work together.
    fn batch_of<P>(&self, prompts: &[P], tokens: impl Fn(&P) -> usize) -> usize {
        let (Some(device), Some(longest)) = (self.model.device_memory(), prompts.iter().map(tokens).max()) else {
            return self.batch;
        };
        let prefix = self.prefix.as_ref().map_or(0, Segment::length);
        let fitting = memory::prompts_on_device(self.model.config(), device, prefix, longest).min(self.batch);
        // Equal parts: a small last one would take as many steps as the others.
        prompts.len().div_ceil(prompts.len().div_ceil(fitting))
    }

    /// Reads prompts (what stands behind the prefix), each with room for `slots` generated tokens; returns them and, for
    /// each, the hidden state of its last token, `[prompts, hidden]`.
    ///
    /// # Errors
    /// As [`Qwen3::branches`] and [`Qwen3::read`].
    pub(super) fn read(
        &self,
        prompts: &[&[u32]],
        slots: usize,
        threads: usize,
    ) -> Result<(Branches<'_>, Vec<f32>), Error> {
        let mut branches = self.model.branches(self.prefix.as_ref(), Room::of(prompts, slots))?;
        let mut hidden = Vec::with_capacity(prompts.len() * self.model.config().hidden_size);
        let padded = self.model.is_on_device();
        for part in parts(prompts, self.rows_at_once, padded, |tokens| tokens.len()) {
            hidden.extend(self.model.read(&mut branches, part, Wanted::Last, threads)?);
        }
        Ok((branches, hidden))
    }

    /// Takes beams forward, `rows_at_once` or so at a time; returns the hidden states of all rows in order.
    ///
    /// # Errors
    /// As [`Qwen3::step`].
    pub(super) fn advance(&self, branches: &mut Branches, steps: &[Step], threads: usize) -> Result<Vec<f32>, Error> {
        let mut hidden = Vec::new();
        for part in parts(steps, self.rows_at_once, self.model.is_on_device(), |step| step.tokens.len()) {
            hidden.extend(self.model.step(branches, part, threads)?);
        }
        Ok(hidden)
    }

    /// For every row of `hidden`, the log-probabilities of its `wanted` tokens (ascending) among the whole vocabulary.
    ///
    /// # Errors
    /// As [`Qwen3::visit_logits`].
    pub(super) fn log_probabilities(
        &self,
        hidden: &[f32],
        wanted: &[&[u32]],
        threads: usize,
    ) -> Result<Vec<Vec<f32>>, Error> {
        let width = self.model.config().hidden_size;
        let mut found = Vec::with_capacity(wanted.len());
        for (hidden, wanted) in hidden.chunks(ROWS_AT_ONCE * width).zip(wanted.chunks(ROWS_AT_ONCE)) {
            found.extend(self.model.log_probabilities(hidden, wanted, threads)?);
        }
        Ok(found)
    }
}

/// Splits `0..count` into parts of at most `most`, smaller towards the end, so that no thread waits long for the last.
fn shrinking(count: usize, most: usize, threads: usize) -> impl Iterator<Item = Range<usize>> {
    let mut start = 0;
    std::iter::from_fn(move || {
        let left = count - start;
        let part = start..start + left.div_ceil(2 * threads).max(most / 4).clamp(1, most).min(left);
        start = part.end;
        (left > 0).then_some(part)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_shrink_towards_the_end_and_leave_nothing_out() {
        for (count, most, threads) in [(0, 8, 2), (1, 8, 2), (64, 8, 2), (7, 1, 3), (100, 64, 4)] {
            let parts: Vec<Range<usize>> = shrinking(count, most, threads).collect();
            assert!(parts.iter().all(|part| (1..=most).contains(&part.len())), "{parts:?}");
            assert!(parts.is_sorted_by(|a, b| a.end == b.start && a.len() >= b.len()), "{parts:?}");
            assert_eq!(parts.iter().map(Range::len).sum::<usize>(), count);
        }
        assert_eq!(shrinking(64, 8, 2).last(), Some(62..64));
    }
}
