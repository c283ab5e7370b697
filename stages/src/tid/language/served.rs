//! A conversation's next turn by a server that speaks OpenAI's `/v1/chat/completions`.

use std::sync::OnceLock;

use grlm_nn::chat::Message;
use serde_json::{Map, Value, json};

use super::{
    LanguageModel,
    ask::{STOP, bytes, no_reasoning},
    dialogue::Reply,
};
use crate::{
    Compat, StageError,
    endpoint::{CallError, Endpoint},
    rows::{RowFunction, RowResult},
};

/// The field by which servers take settings of the chat template.
pub const TEMPLATE_SETTINGS: &str = "chat_template_kwargs";

/// Puts each conversation to a server.
pub struct Served<'a> {
    pub endpoint: &'a Endpoint,
    pub model: &'a LanguageModel,
    pub compat: Compat,
    pub conversations: &'a [&'a [Message]],
    pub takes_settings: &'a OnceLock<bool>,
}

impl RowFunction for Served<'_> {
    fn compute(&mut self, rows: &[usize]) -> Result<Vec<(usize, RowResult)>, StageError> {
        rows.iter()
            .map(|row| match self.post(self.conversations[*row]) {
                Ok(reply) => Ok((*row, bytes(reply))),
                Err(error) => Ok((*row, Err(error.of_one()?))),
            })
            .collect()
    }
}

impl Served<'_> {
    /// The answer to a conversation. Until the server is known to take settings of the template, a request that it
    /// refuses is sent once more without them: if that helps, so are all others.
    fn post(&self, messages: &[Message]) -> Result<Reply, CallError> {
        let post = |body| self.endpoint.post("chat/completions", body, reply);
        let plain = self.body(messages);
        if self.compat.is_reference() || self.takes_settings.get() == Some(&false) {
            return post(plain);
        }
        let mut quick = plain.clone();
        quick.insert(TEMPLATE_SETTINGS.to_owned(), Value::Object(no_reasoning()));
        let answer = post(quick);
        match (&answer, self.takes_settings.get()) {
            (Err(CallError::Refused(_)), None | Some(false)) => {
                self.endpoint.forget_refusal();
                let answer = post(plain)?;
                self.takes_settings.get_or_init(|| false);
                return Ok(answer);
            }
            (Ok(_), None) => {
                self.takes_settings.get_or_init(|| true);
            }
            _ => {}
        }
        answer
    }

    fn body(&self, messages: &[Message]) -> Map<String, Value> {
        let mut body = Map::from_iter([
            ("model".to_owned(), json!(self.model.model)),
            ("messages".to_owned(), json!(messages)),
            ("temperature".to_owned(), json!(0)),
            ("max_tokens".to_owned(), json!(self.model.max_new_tokens)),
        ]);
        if !self.compat.is_reference() {
            body.insert("stop".to_owned(), json!([STOP]));
        }
        body
    }
}

/// The message of a chat completion.
fn reply(answer: &Value) -> Result<Reply, String> {
    let choices = answer["choices"].as_array().ok_or("no list `choices`")?;
    let [choice] = choices.as_slice() else { return Err(format!("{} choices instead of one", choices.len())) };
    let text = match &choice["message"]["content"] {
        Value::String(text) => text.clone(),
        // A server that took the reasoning out, and had no room for more.
        Value::Null if choice["message"].is_object() => String::new(),
        _ => return Err("a choice without a message".into()),
    };
    let tokens = |name: &str| answer["usage"][name].as_u64().unwrap_or_default();
    let (prompt_tokens, answer_tokens) = (tokens("prompt_tokens"), tokens("completion_tokens"));
    Ok(Reply { text, cut: choice["finish_reason"] == "length", prompt_tokens, answer_tokens })
}
