//! A language model that is talked to: conversations through its chat template, greedy answers.
//!
//! What a batch of conversations begins with in common (the instruction) is computed once. An answer does not depend on
//! its batch: see [`crate::generate`].

use std::{fs, path::Path};

use serde_json::{Map, Value};
use tokenizers::Tokenizer;

use crate::{
    Error,
    generate::{Generator, greedy, memory},
    qwen3::{Config, Place, Qwen3},
};

mod template;

pub use template::{ChatTemplate, Message, Role};

/// Conversations that a thread has in work, where there is memory for them; more bring no speed.
const MOST_AT_ONCE: usize = 8;
/// Shared beginnings shorter than this are not worth keeping apart.
const SHORTEST_PREFIX: usize = 16;

/// A model with its tokenizer and chat template.
pub struct ChatModel {
    model: Qwen3,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    /// Tokens that end an answer.
    ends: Vec<u32>,
}

/// How answers are generated.
#[derive(Debug, Clone, Default)]
pub struct Answering {
    /// The longest answer, in tokens.
    pub max_new: usize,
    /// An answer also ends with the first token whose text holds this character.
    pub stop_at: Option<char>,
    /// Memory on the CPU, in bytes, that conversations in work may take beside the weights.
    pub memory: Option<usize>,
    /// Variables for the chat template, such as Qwen3's `enable_thinking`.
    pub template: Map<String, Value>,
}

/// What a model said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Without special tokens.
    pub text: String,
    /// It was as long as it may be before it came to an end.
    pub cut: bool,
    /// Tokens of the conversation.
    pub prompt_tokens: usize,
    /// Tokens generated, with the one that ended the answer.
    pub answer_tokens: usize,
}

impl ChatModel {
    /// Loads a model folder. Runs on the current rayon pool.
    ///
    /// # Errors
    /// A file is missing, damaged or contradicts another; the architecture is not known here; there is no chat
    /// template, or none of use; the model is an encoder.
    pub fn load(folder: &Path) -> Result<Self, Error> {
        Self::load_on(folder, Place::Cpu, &Map::new())
    }

    /// [`ChatModel::load`], to compute in `place`, for conversations with these `settings` of the template.
    ///
    /// # Errors
    /// As [`ChatModel::load`] and [`Qwen3::load_on`].
    pub fn load_on(folder: &Path, place: Place, settings: &Map<String, Value>) -> Result<Self, Error> {
        // The architecture first: an encoder's folder would otherwise be blamed for want of a template.
        Config::load(folder)?;
        let template = ChatTemplate::load(folder)?;
        template.check(settings)?;
        let path = folder.join("tokenizer.json");
        let bytes = fs::read(&path).map_err(|e| Error::io("read", &path, e))?;
        let broken = |e: tokenizers::Error| {
            Error::model(&path, format!("not a tokenizer: {e}")).help("the file may be cut short; copy it again")
        };
        let mut tokenizer = Tokenizer::from_bytes(bytes).map_err(broken)?;
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(broken)?;
        let model = Qwen3::load_on(folder, place)?;
        let ends = model.config().text_ends(folder)?;
        Ok(Self { model, tokenizer, template, ends })
    }

    pub fn model(&self) -> &Qwen3 {
        &self.model
    }

    /// The tokens of a conversation, up to where the answer begins.
    ///
    /// # Errors
    /// The template refuses the conversation, or the tokenizer its text.
    pub fn prompt(&self, conversation: &[Message], settings: &Map<String, Value>) -> Result<Vec<u32>, Error> {
        let text = self.template.render(conversation, settings)?;
        // The template writes all special tokens itself.
        let encoding = self.tokenizer.encode_fast(text, false);
        let encoding = encoding.map_err(|e| Error::argument(format!("the tokenizer cannot take a text: {e}")))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// [`ChatModel::prompt`] where the model has positions for it and the answer.
    ///
    /// # Errors
    /// As [`ChatModel::prompt`]; it has not; there is nothing to answer.
    pub fn prompt_with_room(&self, conversation: &[Message], how: &Answering) -> Result<Vec<u32>, Error> {
        let prompt = self.prompt(conversation, &how.template)?;
        if prompt.is_empty() {
            return Err(Error::argument("chat template and tokenizer make no tokens of the conversation")
                .help("mend them in a copy of the folder, or take another model"));
        }
        let (length, limit) = (prompt.len(), self.model.config().max_positions);
        if length + how.max_new > limit {
            return Err(Error::argument(format!(
                "a prompt of {length} tokens and an answer of up to {} are more than the model's {limit} positions",
                how.max_new
            ))
            .help(
                "show fewer `neighbors`, shorten titles or the `tid_extraction` text (input `prompts`), or take a model \
                 with more positions",
            ));
        }
        Ok(prompt)
    }

    /// The likeliest answer to each conversation, or why the model cannot take that one. Runs on the current rayon pool,
    /// which should have `threads`.
    ///
    /// # Errors
    /// What concerns them all: the model cannot compute, or computes what is no text.
    pub fn answer<C: AsRef<[Message]>>(
        &self,
        conversations: &[C],
        how: &Answering,
        threads: usize,
    ) -> Result<Vec<Result<Answer, Error>>, Error> {
        let mut prompts = Vec::with_capacity(conversations.len());
        let taken: Vec<Result<(), Error>> = conversations
            .iter()
            .map(|conversation| self.prompt_with_room(conversation.as_ref(), how).map(|prompt| prompts.push(prompt)))
            .collect();
        let mut answers = self.answers_to(&prompts, how, threads)?.into_iter();
        let results = taken.into_iter().filter_map(|taken| match taken {
            Ok(()) => answers.next().map(Ok),
            Err(refused) => Some(Err(refused)),
        });
        Ok(results.collect())
    }

    fn answers_to(&self, prompts: &[Vec<u32>], how: &Answering, threads: usize) -> Result<Vec<Answer>, Error> {
        let shared = shared_beginning(prompts);
        let rest: Vec<&[u32]> = prompts.iter().map(|p| &p[shared..]).collect();
        let mut generator = Generator::new(&self.model, threads);
        if let Some(bytes) = how.memory.filter(|_| !self.model.is_on_device()) {
            let longest = rest.iter().map(|tokens| tokens.len()).max().unwrap_or(0);
            let most = memory::prompts_within(self.model.config(), bytes / threads.max(1), longest, how.max_new);
            generator = generator.with_batch(most.min(MOST_AT_ONCE));
        }
        let generator = match prompts.first() {
            Some(first) => generator.with_prefix(&first[..shared])?,
            None => return Ok(Vec::new()),
        };
        let stops = self.stops(how.stop_at);
        let ended = |written: &[u32]| written.last().is_some_and(|token| stops.binary_search(token).is_ok());
        let written = greedy(&generator, &rest, how.max_new, ended)?;
        written
            .iter()
            .zip(prompts)
            .map(|(tokens, prompt)| {
                let text = self.tokenizer.decode(tokens, true);
                let text = text.map_err(|e| Error::argument(format!("the tokenizer cannot write an answer: {e}")))?;
                Ok(Answer { text, cut: !ended(tokens), prompt_tokens: prompt.len(), answer_tokens: tokens.len() })
            })
            .collect()
    }

    /// Tokens that end an answer, in ascending order.
    fn stops(&self, stop_at: Option<char>) -> Vec<u32> {
        let mut stops = self.ends.clone();
        if let Some(stop) = stop_at {
            // Byte-level and word-piece vocabularies spell characters of ASCII as they are.
            let by_byte = format!("<0x{:02X}>", u32::from(stop));
            let vocabulary = self.tokenizer.get_vocab(true);
            stops.extend(
                vocabulary.iter().filter(|(text, _)| text.contains(stop) || **text == by_byte).map(|(_, id)| *id),
            );
        }
        stops.sort_unstable();
        stops.dedup();
        stops
    }
}

/// How many tokens all prompts begin with, leaving each at least one of its own.
pub fn shared_beginning(prompts: &[Vec<u32>]) -> usize {
    let [first, others @ ..] = prompts else { return 0 };
    let shortest = prompts.iter().map(Vec::len).min().unwrap_or(0);
    let mut shared = shortest.saturating_sub(1);
    for other in others {
        shared = first[..shared].iter().zip(other).take_while(|(a, b)| a == b).count();
    }
    if others.is_empty() || shared < SHORTEST_PREFIX { 0 } else { shared }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_share_what_all_begin_with() {
        let prompt = |same: u32, own: &[u32]| (0..same).chain(own.iter().copied()).collect::<Vec<u32>>();
        assert_eq!(shared_beginning(&[prompt(40, &[7]), prompt(40, &[8, 9]), prompt(50, &[1])]), 40);
        assert_eq!(shared_beginning(&[prompt(40, &[]), prompt(40, &[8, 9])]), 39, "each has a token of its own");
        assert_eq!(shared_beginning(&[prompt(10, &[7]), prompt(10, &[8])]), 0, "not worth it");
        assert_eq!(shared_beginning(&[prompt(40, &[7])]), 0);
        assert_eq!(shared_beginning(&[]), 0);
    }

    #[test]
    fn an_answer_that_does_not_end_is_cut() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/encoders/qwen3");
        let mut chat = ChatModel::load(&folder).unwrap();
        let how = Answering { max_new: 4, ..Answering::default() };
        chat.ends = Vec::new();
        let cut = chat.answer(&[[Message::user("Soap")]], &how, 1).unwrap().remove(0).unwrap();
        assert!(cut.cut && cut.answer_tokens == 4, "{cut:?}");
        chat.ends = (0..chat.model.config().vocab_size as u32).collect();
        let whole = chat.answer(&[[Message::user("Soap")]], &how, 1).unwrap().remove(0).unwrap();
        assert!(!whole.cut && whole.answer_tokens == 1, "{whole:?}");
    }

    #[test]
    fn a_conversation_that_is_too_long_is_refused_alone() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/encoders/qwen3");
        let chat = ChatModel::load(&folder).unwrap();
        let how = Answering { max_new: 4, ..Answering::default() };
        let [soap, long, towel] = ["Soap".to_owned(), "soap ".repeat(400), "Towel".to_owned()].map(Message::user);
        let together = chat.answer(&[[soap.clone()], [long], [towel.clone()]], &how, 1).unwrap();
        let refused = together[1].as_ref().unwrap_err();
        assert!(refused.to_string().ends_with("are more than the model's 256 positions"), "{refused}");
        for (which, message) in [(0, soap), (2, towel)] {
            let alone = chat.answer(&[[message]], &how, 1).unwrap().remove(0).unwrap();
            assert_eq!(together[which].as_ref().unwrap(), &alone);
        }
    }
}
