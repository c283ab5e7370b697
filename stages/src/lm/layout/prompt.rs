//! What generation asks with: the prompt of a history, and the tokens of the TID that goes on from it.

use super::{Layout, newest_within};
use crate::{
    Compat, StageError,
    artifact::{SftFormat, TidRecord, TokenKind},
    lm::samples::content,
    sft::rec_text::{self, Place, TID_LABEL},
};

/// What a model is asked with.
pub struct HistoryPrompt {
    pub tokens: Vec<u32>,
    /// How many of the oldest items it has no room for.
    pub dropped: usize,
}

impl Layout {
    /// The prompt after which the model writes the TID of the next item, given the items so far, oldest first. The
    /// oldest are left out until `room` tokens are free for the answer.
    ///
    /// # Errors
    /// The history is empty, or not even its last item fits.
    pub fn prompt(&self, history: &[&TidRecord], compat: Compat, room: usize) -> Result<HistoryPrompt, StageError> {
        if history.is_empty() {
            return Err(StageError::params("a prompt needs at least one item"));
        }
        let limit = self.settings.max_length.saturating_sub(room);
        let mut first = 0;
        if self.settings.format == SftFormat::Compact {
            let lines: Vec<Vec<u32>> = history.iter().map(|r| self.compact_line(r)).collect::<Result<_, _>>()?;
            let (mut tokens, before) = match self.settings.tokens {
                TokenKind::Words | TokenKind::Prefixes => (self.bos.into_iter().collect(), Vec::new()),
                TokenKind::Model => self.frame("")?,
            };
            tokens.extend(before);
            let kept = newest_within(&lines, limit.saturating_sub(tokens.len()));
            lines[lines.len() - kept..].iter().for_each(|line| tokens.extend(line));
            let dropped = lines.len() - kept;
            return if kept == 0 { Err(self.no_room(room)) } else { Ok(HistoryPrompt { tokens, dropped }) };
        }
        while first < history.len() {
            let tokens = self.text_prompt(&history[first..], compat)?;
            if tokens.len() <= limit {
                return Ok(HistoryPrompt { tokens, dropped: first });
            }
            let excess = (tokens.len() - limit) * (history.len() - first) / tokens.len();
            first += excess.max(1);
        }
        Err(self.no_room(room))
    }

    fn no_room(&self, room: usize) -> StageError {
        let length = self.settings.max_length;
        StageError::params(format!(
            "the last item of a history and {room} tokens for the answer do not fit into the model's {length}"
        ))
        .help("train with a greater `max_length`; in `decoding: free`, a lower `max_new_tokens` may do")
    }

    fn text_prompt(&self, history: &[&TidRecord], compat: Compat) -> Result<Vec<u32>, StageError> {
        let (mut input, mut output) = (String::new(), String::new());
        rec_text::push_text(&mut input, history[0], Place::First, compat);
        for record in &history[1..] {
            rec_text::push_text(&mut output, record, Place::Later, compat);
        }
        let (mut tokens, response) = self.frame(&content(&self.settings.instruction, &input))?;
        tokens.extend(response);
        // The label may be joined with the line break before it, so the response is tokenised as a whole.
        output.push_str(TID_LABEL);
        tokens.extend(self.tokenizer.encode(&output)?);
        Ok(tokens)
    }

    fn compact_line(&self, record: &TidRecord) -> Result<Vec<u32>, StageError> {
        let mut line = String::new();
        rec_text::push_compact(&mut line, record);
        self.line(&line)
    }

    /// The tokens that go on from a prompt with an item's TID, to its end: the bracket (with the line break, where the
    /// tokenizer joins the two and the item has no title), the line break, or the last word. `None` for a TID with a
    /// word that the vocabulary lacks: the model can never write it.
    ///
    /// # Errors
    /// The tokenizer joins the label with what stands behind it, so that a prompt cannot end there.
    pub fn tid(&self, record: &TidRecord, compat: Compat) -> Result<Option<Vec<u32>>, StageError> {
        if self.settings.format == SftFormat::Compact {
            let tokens = self.compact_line(record)?;
            let unknown = self.tokenizer.unknown();
            return Ok((!tokens.iter().any(|&t| Some(t) == unknown)).then_some(tokens));
        }
        let mut text = String::new();
        rec_text::push_text(&mut text, record, Place::Later, compat);
        let mut tid = String::from(TID_LABEL);
        tid.push(' ');
        match compat {
            Compat::Reference => rec_text::push_tid(&mut tid, record.words()),
            Compat::Fixed => rec_text::push_tid(&mut tid, record.clean_words()),
        }
        // What follows decides how the bracket is tokenised, but only its beginning does.
        let end = tid.len();
        let follows = text[end..].char_indices().nth(8).map_or(text.len(), |(at, _)| end + at);
        let placed = self.tokenizer.encode_placed(&text[..follows])?;
        let (label, rest) = placed.split_at(self.label.len().min(placed.len()));
        if label.iter().map(|p| p.token).ne(self.label.iter().copied()) {
            return Err(StageError::params("the tokenizer joins `Item text ID:` with the bracket behind it").help(
                "such a tokenizer cannot go on from a history; use a tokenizer of Qwen, or one made by `train`",
            ));
        }
        let count = rest.iter().take_while(|p| p.end < end).count() + 1;
        let tokens: Vec<u32> = rest.iter().take(count).map(|p| p.token).collect();
        let unknown = self.tokenizer.unknown();
        Ok((!tokens.iter().any(|&t| Some(t) == unknown)).then_some(tokens))
    }
}
