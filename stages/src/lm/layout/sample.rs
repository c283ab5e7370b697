//! Samples in tokens, and what is left out of those that are too long.

use super::{Layout, newest_within, user_turn_start};
use crate::{
    StageError,
    artifact::{ChatTemplate, TokenKind},
    lm::{
        prefixes,
        samples::{Sample, Shape, content, items},
    },
};

/// A sample in tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Laid {
    pub tokens: Vec<u32>,
    /// The first token that the model learns to write.
    pub learned_from: usize,
    /// Whether it was longer than allowed, and lost its oldest items or the end of its prompt.
    pub cut: bool,
}

impl Layout {
    /// A sample in tokens. One that is longer than [`Settings::max_length`] is cut: a history loses its oldest items;
    /// any other sample loses the end of its prompt, and the end of its response only when that alone is too long.
    ///
    /// # Errors
    /// The tokenizer cannot take the text.
    pub fn sample(&self, sample: &Sample) -> Result<Laid, StageError> {
        match (self.settings.tokens, sample.shape()) {
            (TokenKind::Words | TokenKind::Prefixes, _) => self.words_sample(&sample.output),
            (_, Shape::Compact) => self.compact_sample(&sample.output),
            (_, Shape::History) => self.history_sample(sample),
            (_, Shape::Other) => self.other_sample(sample),
        }
    }

    fn words_sample(&self, output: &str) -> Result<Laid, StageError> {
        let lines: Vec<Vec<u32>> = output.lines().map(|line| self.line(line)).collect::<Result<_, _>>()?;
        Ok(self.newest(&lines))
    }

    /// The tokens of a line of a compact sample.
    pub(super) fn line(&self, line: &str) -> Result<Vec<u32>, StageError> {
        match self.settings.tokens {
            TokenKind::Prefixes => Ok(prefixes::encode(&self.tokenizer, &line.split_whitespace().collect::<Vec<_>>())),
            TokenKind::Words | TokenKind::Model => Ok(self.tokenizer.encode(line)?),
        }
    }

    /// Lines are tokenised one by one, as generation reads them.
    fn compact_sample(&self, output: &str) -> Result<Laid, StageError> {
        let mut lines = Vec::new();
        for line in output.lines() {
            lines.push(self.line(&format!("{line}\n"))?);
        }
        let (head, before) = self.frame("")?;
        let room = self.settings.max_length.saturating_sub(head.len() + before.len() + self.end.len());
        let kept = newest_within(&lines, room);
        let learned_from = head.len();
        let mut tokens = head;
        tokens.extend(before);
        lines[lines.len() - kept..].iter().for_each(|line| tokens.extend(line));
        tokens.extend(&self.end);
        Ok(self.hard_cut(tokens, learned_from, kept < lines.len()))
    }

    /// `bos` and the newest of `lines` that there is room for.
    fn newest(&self, lines: &[Vec<u32>]) -> Laid {
        let mut tokens: Vec<u32> = self.bos.into_iter().collect();
        let learned_from = tokens.len();
        let kept = newest_within(lines, self.settings.max_length.saturating_sub(tokens.len()));
        lines[lines.len() - kept..].iter().for_each(|line| tokens.extend(line));
        Laid { tokens, learned_from, cut: kept < lines.len() }
    }

    fn history_sample(&self, sample: &Sample) -> Result<Laid, StageError> {
        let whole = self.question_and_answer(&sample.content(), &sample.output)?;
        if whole.0.len() + whole.1.len() <= self.settings.max_length {
            return Ok(joined(whole, false));
        }
        let all: Vec<&str> = std::iter::once(sample.input.as_str()).chain(items(&sample.output)).collect();
        // The newest two items always stay: one to see, and one to learn.
        let latest = all.len().saturating_sub(2);
        let mut first = (whole.0.len() + whole.1.len()).saturating_sub(self.settings.max_length);
        // A start that is near the answer: every item about as long as the average one.
        first = (first * all.len() / (whole.0.len() + whole.1.len())).clamp(1, latest.max(1));
        loop {
            let from = first.min(latest);
            let content = content(&sample.instruction, all[from]);
            let parts = self.question_and_answer(&content, &all[from + 1..].concat())?;
            if parts.0.len() + parts.1.len() <= self.settings.max_length {
                return Ok(joined(parts, true));
            }
            if from == latest {
                return self.shortened(parts);
            }
            first += 1;
        }
    }

    fn other_sample(&self, sample: &Sample) -> Result<Laid, StageError> {
        let parts = self.question_and_answer(&sample.content(), &sample.output)?;
        if parts.0.len() + parts.1.len() <= self.settings.max_length {
            return Ok(joined(parts, false));
        }
        self.shortened(parts)
    }

    /// Takes tokens from the end of what was asked (before what the template puts there), then from the response.
    fn shortened(&self, (mut prompt, response): (Vec<u32>, Vec<u32>)) -> Result<Laid, StageError> {
        let (head, tail) = match self.settings.template {
            ChatTemplate::None => (usize::from(self.bos.is_some()), 0),
            _ => {
                let head = self.tokenizer.encode(&user_turn_start())?.len();
                (head, self.frame("")?.0.len() - head)
            }
        };
        let excess = (prompt.len() + response.len()).saturating_sub(self.settings.max_length);
        let end = prompt.len() - tail;
        let start = end.saturating_sub(excess).max(head.min(end));
        prompt.drain(start..end);
        let learned_from = prompt.len();
        prompt.extend(response);
        Ok(self.hard_cut(prompt, learned_from, true))
    }

    fn hard_cut(&self, mut tokens: Vec<u32>, learned_from: usize, cut: bool) -> Laid {
        let too_long = tokens.len() > self.settings.max_length;
        tokens.truncate(self.settings.max_length);
        Laid { learned_from: learned_from.min(tokens.len()), tokens, cut: cut || too_long }
    }

    /// What is asked, and what is answered, with all that the template puts around them.
    fn question_and_answer(&self, content: &str, output: &str) -> Result<(Vec<u32>, Vec<u32>), StageError> {
        let (prompt, mut response) = self.frame(content)?;
        response.extend(self.tokenizer.encode(output)?);
        response.extend(&self.end);
        Ok((prompt, response))
    }
}

fn joined((mut tokens, response): (Vec<u32>, Vec<u32>), cut: bool) -> Laid {
    let learned_from = tokens.len();
    tokens.extend(response);
    Laid { tokens, learned_from, cut }
}
