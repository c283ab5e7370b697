//! From a sample to tokens, and from a history to the prompt of which that sample would have been the continuation.
//!
//! | | prompt, not learned | response, learned |
//! |---|---|---|
//! | template `none` | `bos` instruction ⏎ input | output, end of turn |
//! | `qwen3_nothink` | `<\|im_start\|>user` ⏎ instruction ⏎ input `<\|im_end\|>` ⏎ `<\|im_start\|>assistant` ⏎ | output `<\|im_end\|>` ⏎ |
//! | `qwen3` | the same | an empty think block, output `<\|im_end\|>` ⏎ |
//!
//! These are the renderings of LlamaFactory's templates of those names. Prompt and response are tokenised apart, as
//! there. Under `tokens: words` a sample is `bos` and the words of its items, and has no end; `tokens: prefixes` likewise
//! (see [`super::prefixes`]).
//!
//! A generation prompt ends behind `Item text ID:` and *without* the space that follows it, because subword tokenizers
//! join that space with the bracket; in compact format it ends behind the line break of the last item.

use std::path::Path;

use grlm_nn::{Tokenizer, tokenizer::special};

use crate::{
    StageError,
    artifact::{ChatTemplate, CheckpointInfo, SftFormat, TokenKind},
    sft::rec_text::TID_LABEL,
};

mod prompt;
mod sample;
#[cfg(test)]
mod tests;

pub use prompt::HistoryPrompt;
pub use sample::Laid;

/// The empty think block of template `qwen3`.
const NO_THOUGHT: &str = "<think>\n\n</think>\n\n";

/// How samples are laid out: what `grlm.json` says of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    pub format: SftFormat,
    pub tokens: TokenKind,
    pub template: ChatTemplate,
    /// The token that every sample starts with, as spelled in the tokenizer; none under the chat templates.
    pub bos: Option<String>,
    /// The instruction of histories.
    pub instruction: String,
    /// Tokens of the longest sample.
    pub max_length: usize,
}

impl From<&CheckpointInfo> for Settings {
    fn from(info: &CheckpointInfo) -> Self {
        Self {
            format: info.format,
            tokens: info.tokens,
            template: info.template,
            bos: info.bos.clone(),
            instruction: info.instruction.clone(),
            max_length: info.max_length,
        }
    }
}

/// A tokenizer, and how samples are laid out for it.
pub struct Layout {
    tokenizer: Tokenizer,
    settings: Settings,
    bos: Option<u32>,
    /// What ends a response.
    end: Vec<u32>,
    /// [`TID_LABEL`], at the beginning of a line.
    label: Vec<u32>,
}

impl Layout {
    /// # Errors
    /// The tokenizer has no such `bos`, or lacks the tokens of the template, or has no word tokens where they are
    /// asked for.
    pub fn new(tokenizer: Tokenizer, settings: Settings) -> Result<Self, StageError> {
        let lacks = |token: &str, help: &str| {
            StageError::params(format!("the tokenizer has no token `{token}`")).help(help.to_owned())
        };
        let bos = settings.bos.as_deref().map(|token| {
            tokenizer
                .id(token)
                .ok_or_else(|| lacks(token, "the tokenizer is not the one that the model was trained with"))
        });
        let bos = bos.transpose()?;
        if settings.tokens != TokenKind::Model && !tokenizer.is_of_words() {
            return Err(StageError::params("the tokenizer is not one of words")
                .help("use `tokens: model`, or train from scratch on a compact SFT file"));
        }
        let end = match (settings.tokens, settings.template) {
            (TokenKind::Words | TokenKind::Prefixes, _) => Vec::new(),
            (TokenKind::Model, ChatTemplate::None) => tokenizer.id(special::TURN_END).into_iter().collect(),
            (TokenKind::Model, _) => {
                for token in [special::TURN_START, special::TURN_END] {
                    tokenizer.id(token).ok_or_else(|| lacks(token, "use `template: none`, or a chat model of Qwen"))?;
                }
                tokenizer.encode(&format!("{}\n", special::TURN_END))?
            }
        };
        let label = tokenizer.encode(TID_LABEL)?;
        Ok(Self { tokenizer, settings, bos, end, label })
    }

    /// The layout of a checkpoint folder that `train` wrote.
    ///
    /// # Errors
    /// `grlm.json` or `tokenizer.json` is missing or wrong, or they do not fit together.
    pub fn open(folder: &Path) -> Result<(Self, CheckpointInfo), StageError> {
        let info = CheckpointInfo::read(folder)?;
        let layout = Self::new(Tokenizer::load(folder)?, Settings::from(&info))?;
        Ok((layout, info))
    }

    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The prompt for `content`, and what stands at the beginning of its response.
    fn frame(&self, content: &str) -> Result<(Vec<u32>, Vec<u32>), StageError> {
        let mut prompt: Vec<u32> = self.bos.into_iter().collect();
        let response = match self.settings.template {
            ChatTemplate::None => {
                prompt.extend(self.tokenizer.encode(content)?);
                Vec::new()
            }
            template => {
                let start = user_turn_start();
                let (end, turn) = (special::TURN_END, special::TURN_START);
                prompt.extend(self.tokenizer.encode(&format!("{start}{content}{end}\n{turn}assistant\n"))?);
                match template {
                    ChatTemplate::Qwen3 => self.tokenizer.encode(NO_THOUGHT)?,
                    _ => Vec::new(),
                }
            }
        };
        Ok((prompt, response))
    }
}

fn user_turn_start() -> String {
    format!("{}user\n", special::TURN_START)
}

/// How many of the last lines fit into `room` tokens.
fn newest_within(lines: &[Vec<u32>], room: usize) -> usize {
    let mut used = 0;
    let fits = |line: &&Vec<u32>| {
        used += line.len();
        used <= room
    };
    lines.iter().rev().take_while(fits).count()
}
