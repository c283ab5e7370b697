//! Beam search over the whole vocabulary, as transformers' `generate(num_beams=…)` does it.
//!
//! At every step the best `beams × (1 + ends)` continuations of a prompt are looked at, where `ends` is the
//! number of tokens that end a text. Those among the first `beams` that end go into the list of finished texts, which
//! keeps the best `beams` by score / length^penalty; the first `beams` that do not end go on. At `max_new` tokens
//! everything ends. A prompt is done early when its best running beam, at its present length, is no better than the
//! worst of a full list (transformers' `early_stopping=False`).

use super::{Generator, memory, session::ROWS_AT_ONCE};
use crate::{
    Error,
    cpu::ops::{self, LogSumExp},
    nearest::best::Best,
    qwen3::Step,
};

/// How texts are searched for.
#[derive(Debug, Clone, PartialEq)]
pub struct Free {
    pub beams: usize,
    pub max_new: usize,
    /// The score is the sum of log-probabilities / length^this; transformers' default is 1.
    pub length_penalty: f32,
    /// Tokens that end a text.
    pub ends: Vec<u32>,
}

/// A text that a beam has written.
#[derive(Debug, Clone, PartialEq)]
pub struct Hypothesis {
    /// What was generated, with the token that ended it.
    pub tokens: Vec<u32>,
    /// The log-probability of each of `tokens`.
    pub log_probabilities: Vec<f32>,
    pub score: f32,
}

/// A text that is not finished.
#[derive(Clone, Default)]
struct Running {
    tokens: Vec<u32>,
    log_probabilities: Vec<f32>,
    /// The slots of all tokens but the last.
    path: Vec<u32>,
    sum: f32,
}

/// One prompt's search.
#[derive(Default)]
struct Search {
    running: Vec<Running>,
    finished: Vec<Hypothesis>,
    done: bool,
}

impl Free {
    /// For every prompt its `beams` best texts, best first.
    ///
    /// # Errors
    /// No beams or no tokens to generate; as [`crate::qwen3::Qwen3::read`]; a model without a head.
    pub fn search(&self, generator: &Generator, prompts: &[&[u32]]) -> Result<Vec<Vec<Hypothesis>>, Error> {
        if self.beams == 0 || self.max_new == 0 {
            return Err(Error::argument("beam search needs at least one beam and one new token"));
        }
        let tokens = |prompt: &&[u32]| prompt.len() + memory::free_slots(self.beams, self.max_new);
        generator.share_out(prompts, tokens, |prompts, threads| self.batch(generator, prompts, threads))
    }

    /// Continuations that are looked at: of those of each beam, no more than `ends` end a text.
    fn considered(&self) -> usize {
        self.beams * (1 + self.ends.len())
    }

    fn batch(&self, generator: &Generator, prompts: &[&[u32]], threads: usize) -> Result<Vec<Vec<Hypothesis>>, Error> {
        let slots = memory::free_slots(self.beams, self.max_new);
        let (mut branches, mut hidden) = generator.read(prompts, slots, threads)?;
        let begin = |_| Search { running: vec![Running::default()], ..Search::default() };
        let mut searches: Vec<Search> = prompts.iter().map(begin).collect();
        loop {
            let mut rows = self.best_of_rows(generator, &hidden, threads)?.into_iter();
            for search in searches.iter_mut().filter(|s| !s.done) {
                let rows: Vec<Row> = rows.by_ref().take(search.running.len()).collect();
                self.choose(search, &rows);
            }
            let paths: Vec<Vec<Vec<u32>>> = searches
                .iter_mut()
                .map(|s| s.running.iter_mut().map(|r| std::mem::take(&mut r.path)).collect())
                .collect();
            let tokens: Vec<Vec<u32>> =
                searches.iter().map(|s| s.running.iter().filter_map(|r| r.tokens.last().copied()).collect()).collect();
            let all = tokens.iter().zip(&paths).enumerate();
            let steps = all.map(|(prompt, (tokens, paths))| Step { prompt, tokens, paths });
            let steps: Vec<Step> = steps.filter(|step| !searches[step.prompt].done).collect();
            if steps.is_empty() {
                break;
            }
            hidden = generator.advance(&mut branches, &steps, threads)?;
            for (which, (search, paths)) in searches.iter_mut().zip(paths).enumerate().filter(|(_, (s, _))| !s.done) {
                let first = branches.slots(which) - search.running.len();
                for (slot, (running, path)) in (first as u32..).zip(search.running.iter_mut().zip(paths)) {
                    running.path = path;
                    running.path.push(slot);
                }
            }
        }
        Ok(searches.into_iter().map(|s| s.finished).collect())
    }

    /// For every row of `hidden` the tokens that may be among the best continuations, with their log-probabilities.
    fn best_of_rows(&self, generator: &Generator, hidden: &[f32], threads: usize) -> Result<Vec<Row>, Error> {
        let model = generator.model;
        let mut rows = Vec::new();
        for hidden in hidden.chunks(ROWS_AT_ONCE * model.config().hidden_size) {
            let count = hidden.len() / model.config().hidden_size;
            let mut best: Vec<(Best, LogSumExp)> =
                (0..count).map(|_| (Best::new(self.considered()), LogSumExp::default())).collect();
            let mut places = Vec::new();
            model.visit_logits(hidden, threads, |row, first, logits| {
                let (best, sum) = &mut best[row];
                ops::not_below(logits, best.bar(), &mut places);
                places.iter().for_each(|place| best.offer(first as u32 + place, logits[*place as usize]));
                sum.add(logits);
            })?;
            rows.extend(best.into_iter().map(|(best, sum)| {
                let sum = sum.value();
                best.into_unsorted().into_iter().map(|(token, logit)| (token, logit - sum)).collect::<Row>()
            }));
        }
        Ok(rows)
    }

    /// Takes one prompt's beams a token further.
    fn choose(&self, search: &mut Search, rows: &[Row]) {
        let running = std::mem::take(&mut search.running);
        let mut candidates: Vec<Candidate> = Vec::with_capacity(rows.iter().map(Vec::len).sum());
        for (beam, (from, row)) in running.iter().zip(rows).enumerate() {
            candidates.extend(row.iter().map(|&(token, log_probability)| Candidate {
                sum: from.sum + log_probability,
                beam,
                token,
                log_probability,
            }));
        }
        let order = |a: &Candidate, b: &Candidate| {
            b.sum.total_cmp(&a.sum).then(a.beam.cmp(&b.beam)).then(a.token.cmp(&b.token))
        };
        let considered = self.considered();
        if candidates.len() > considered {
            candidates.select_nth_unstable_by(considered - 1, order);
            candidates.truncate(considered);
        }
        candidates.sort_unstable_by(order);
        let length = running.first().map_or(0, |r| r.tokens.len()) + 1;
        let divisor = (length as f32).powf(self.length_penalty);
        for (rank, candidate) in candidates.iter().enumerate() {
            let ended = length == self.max_new || self.ends.contains(&candidate.token);
            let continued = || {
                let mut next = running[candidate.beam].clone();
                next.tokens.push(candidate.token);
                next.log_probabilities.push(candidate.log_probability);
                next.sum = candidate.sum;
                next
            };
            if !ended && search.running.len() < self.beams {
                search.running.push(continued());
            } else if ended && rank < self.beams {
                let Running { tokens, log_probabilities, sum, .. } = continued();
                search.finished.push(Hypothesis { tokens, log_probabilities, score: sum / divisor });
            }
        }
        // A stable sort: of equal scores the one that finished first stays.
        search.finished.sort_by(|a, b| b.score.total_cmp(&a.score));
        search.finished.truncate(self.beams);
        let hopeless = match (search.finished.get(self.beams - 1), search.running.first()) {
            (Some(worst), Some(best)) => best.sum / divisor <= worst.score,
            (_, best) => best.is_none(),
        };
        if hopeless || length == self.max_new {
            search.done = true;
            search.running.clear();
        }
    }
}

/// The best continuations of one beam: token and log-probability.
type Row = Vec<(u32, f32)>;

struct Candidate {
    sum: f32,
    beam: usize,
    token: u32,
    log_probability: f32,
}
