//! One item's conversation with a model: the prompt, its answer, and what is said to an answer that is of no use.

use grlm_nn::chat::Message;
use serde::{Deserialize, Serialize};

use super::super::parse;
use crate::{Compat, artifact::TID_LENGTH};

/// How every request for five words ends.
pub const FORM: &str = "Answer with exactly five words in square brackets, separated by commas, and nothing else, as in \
                        [first, second, third, fourth, fifth]:";

/// What a model said at last, and what it took: the result of a row.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The last answer, as it came.
    pub answer: String,
    /// How often the model was asked.
    pub attempts: u32,
    /// Tokens of all prompts and of all answers, as far as the server tells.
    pub prompt_tokens: u64,
    pub answer_tokens: u64,
}

/// An answer to one request.
pub struct Reply {
    pub text: String,
    pub prompt_tokens: u64,
    pub answer_tokens: u64,
}

/// A conversation that goes on until an answer is usable, or was asked for often enough.
pub struct Dialogue {
    messages: Vec<Message>,
    compat: Compat,
    max_attempts: u32,
    record: Record,
}

impl Dialogue {
    /// `reference` takes the first answer, whatever it is.
    pub fn new(messages: Vec<Message>, compat: Compat, max_attempts: u32) -> Self {
        let max_attempts = if compat.is_reference() { 1 } else { max_attempts };
        Self { messages, compat, max_attempts, record: Record::default() }
    }

    /// What the model is asked next.
    pub fn messages(&self) -> &[Message] {
        &self.messages
    }

    /// Takes an answer; returns whether the conversation is over.
    pub fn take(&mut self, reply: Reply) -> bool {
        self.record.attempts += 1;
        self.record.prompt_tokens += reply.prompt_tokens;
        self.record.answer_tokens += reply.answer_tokens;
        self.record.answer = reply.text;
        if self.compat.is_reference() || self.record.attempts >= self.max_attempts {
            return true;
        }
        match parse::fixed(without_thoughts(&self.record.answer)) {
            Ok(_) => true,
            Err(unusable) => {
                self.messages.push(Message::assistant(self.record.answer.clone()));
                self.messages.push(Message::user(complaint(&unusable.words)));
                false
            }
        }
    }

    pub fn into_record(self) -> Record {
        self.record
    }
}

/// What was wrong with an answer in which only `words` could be read.
fn complaint(words: &[String]) -> String {
    let found = match words {
        [] => "no words".to_owned(),
        [one] => format!("one word (`{one}`)"),
        several => format!("{} words (`{}`)", several.len(), several.join("`, `")),
    };
    format!("That answer holds {found} instead of {TID_LENGTH}. {FORM}")
}

/// An answer without the reasoning that some models put before it.
pub fn without_thoughts(answer: &str) -> &str {
    match answer.rsplit_once("</think>") {
        Some((_, said)) => said.trim_start(),
        None => answer,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply(text: &str) -> Reply {
        Reply { text: text.into(), prompt_tokens: 10, answer_tokens: 2 }
    }

    fn dialogue(compat: Compat) -> Dialogue {
        Dialogue::new(vec![Message::user("Name it")], compat, 3)
    }

    #[test]
    fn unusable_answers_are_asked_again_with_what_was_wrong() {
        let mut talk = dialogue(Compat::Fixed);
        assert!(!talk.take(reply("[a, b]")));
        let said: Vec<&str> = talk.messages().iter().map(|m| m.content.as_str()).collect();
        assert_eq!(said[..2], ["Name it", "[a, b]"]);
        assert!(said[2].starts_with("That answer holds 2 words (`a`, `b`) instead of 5. Answer with exactly"));
        assert!(talk.take(reply("<think>[x, y]</think>\n\n[a, b, c, d, e]")));
        let record = talk.into_record();
        assert_eq!((record.attempts, record.prompt_tokens, record.answer_tokens), (2, 20, 4));
        assert!(parse::fixed(without_thoughts(&record.answer)).is_ok());
    }

    #[test]
    fn it_ends_after_the_last_attempt_and_the_reference_never_asks_again() {
        let mut talk = dialogue(Compat::Fixed);
        assert!(!talk.take(reply("")) && !talk.take(reply("?")) && talk.take(reply("[a]")));
        assert_eq!((talk.messages().len(), talk.into_record().answer.as_str()), (5, "[a]"));
        let mut talk = dialogue(Compat::Reference);
        assert!(talk.take(reply("")));
        assert_eq!(complaint(&[]).split('.').next(), Some("That answer holds no words instead of 5"));
        assert!(complaint(&["a".into()]).contains("one word (`a`)"));
    }
}
