//! One item's conversation with a model: the prompt, its answer, and what is said to an answer that is of no use.

use grlm_nn::chat::Message;
use serde::{Deserialize, Serialize};

use super::super::parse::{self, Unusable};
use crate::{Compat, artifact::TID_LENGTH};

/// How every request for five words ends.
pub const FORM: &str = "Answer with exactly five words in square brackets, separated by commas, and nothing else, as in \
                        [first, second, third, fourth, fifth]:";

/// An answer to one request: the result of a row.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reply {
    /// As it came.
    pub text: String,
    /// It ended because it was as long as it may be.
    pub cut: bool,
    /// Tokens, as far as the server tells.
    pub prompt_tokens: u64,
    pub answer_tokens: u64,
}

impl Reply {
    /// Whether there is nothing but reasoning, if that.
    pub fn is_silent(&self) -> bool {
        parse::without_thoughts(&self.text).is_empty()
    }
}

/// What a model said at last, and what it took.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Record {
    pub answer: String,
    /// As [`Reply::cut`].
    pub cut: bool,
    /// How often the model was asked.
    pub attempts: u32,
    /// Tokens of all prompts and of all answers.
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
        self.record.cut = reply.cut;
        if self.compat.is_reference() || self.record.attempts >= self.max_attempts {
            return true;
        }
        match parse::fixed(&self.record.answer, self.record.cut) {
            Ok(_) => true,
            Err(unusable) => {
                self.messages.push(Message::assistant(parse::without_thoughts(&self.record.answer)));
                self.messages.push(Message::user(complaint(&unusable, self.record.cut)));
                false
            }
        }
    }

    /// Whether there is an answer, usable or not.
    pub fn has_answer(&self) -> bool {
        self.record.attempts > 0
    }

    pub fn into_record(self) -> Record {
        self.record
    }
}

/// What was wrong with an answer, which may have been `cut` off at its greatest length.
fn complaint(unusable: &Unusable, cut: bool) -> String {
    let problem = match unusable {
        Unusable::Repeated { word, .. } => format!("the word `{word}` twice. Use {TID_LENGTH} different words"),
        Unusable::TooFew(words) => match words.as_slice() {
            [] => format!("no words instead of {TID_LENGTH}"),
            [one] => format!("one word (`{one}`) instead of {TID_LENGTH}"),
            several => format!("{} words (`{}`) instead of {TID_LENGTH}", several.len(), several.join("`, `")),
        },
    };
    match cut {
        false => format!("That answer holds {problem}. {FORM}"),
        true => format!("That answer was too long and was cut off: what there is of it holds {problem}. {FORM}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply(text: &str) -> Reply {
        Reply { text: text.into(), cut: false, prompt_tokens: 10, answer_tokens: 2 }
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
        assert!(parse::fixed(&record.answer, record.cut).is_ok());
    }

    #[test]
    fn a_repeated_word_and_a_cut_one_are_asked_again() {
        let mut talk = dialogue(Compat::Fixed);
        assert!(!talk.take(reply("<think>x</think>[tape, tape, tape, tape, tape]")));
        assert_eq!(talk.messages()[1].content, "[tape, tape, tape, tape, tape]");
        assert!(
            talk.messages()[2].content.starts_with("That answer holds the word `tape` twice. Use 5 different words.")
        );
        let mut talk = dialogue(Compat::Fixed);
        assert!(!talk.take(Reply { cut: true, ..reply("[steel, bolt, fastener, zinc, pl") }));
        let cut = "That answer was too long and was cut off: what there is of it holds 4 words (`steel`, ";
        assert!(talk.messages()[2].content.starts_with(cut), "{}", talk.messages()[2].content);
    }

    #[test]
    fn it_ends_after_the_last_attempt_and_the_reference_never_asks_again() {
        let mut talk = dialogue(Compat::Fixed);
        assert!(!talk.take(reply("")) && !talk.take(reply("?")) && talk.take(reply("[a]")));
        assert_eq!((talk.messages().len(), talk.into_record().answer.as_str()), (5, "[a]"));
        let mut talk = dialogue(Compat::Reference);
        assert!(talk.take(reply("")));
        let begins = |unusable: Unusable| complaint(&unusable, false).split('.').next().unwrap().to_owned();
        assert_eq!(begins(Unusable::TooFew(Vec::new())), "That answer holds no words instead of 5");
        assert_eq!(begins(Unusable::TooFew(vec!["a".into()])), "That answer holds one word (`a`) instead of 5");
    }
}
