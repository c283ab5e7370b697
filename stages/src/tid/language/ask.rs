//! Conversations as rows: put to a model on this machine, or to a server that speaks OpenAI's `/v1/chat/completions`.

use grlm_nn::{
    chat::{Answering, ChatModel, Message},
    generate::PROMPTS_ON_DEVICE,
};
use serde_json::{Map, Value, json};

use super::{
    LanguageModel,
    dialogue::{Dialogue, Record, Reply},
};
use crate::{
    Compat, StageContext, StageError,
    compute::{CPU, PerDevice},
    endpoint::{Endpoint, gather},
    rows::{self, RowDevice, RowFailure, RowFunction, RowJob, RowRecipe, RowResult},
};

/// The parameter that names the model.
pub const PLACE: &str = "extractor.model";
const NAMESPACE: &str = "tid-answer";
/// Raised when the code of this folder, of `parse` or of the chat model changes what an item's answer is.
const ROW_VERSION: u32 = 1;
/// Conversations that the CPU gets at a time; a GPU gets as many as it may have in work together.
const PIECE: usize = 32;
/// Conversations for each request that may be under way at once: the last of a piece are waited for.
const PIECE_PER_REQUEST: usize = 4;
/// Where answers end.
const STOP: char = ']';

/// A model to be asked.
pub struct Asker<'a> {
    model: &'a LanguageModel,
    compat: Compat,
    place: Place,
    max_failed_rows: usize,
}

enum Place {
    /// Weights are loaded when they are needed first, and once for all rounds of questions.
    Folder {
        /// What tells the model apart.
        identity: String,
        /// What computes, as it stands in the keys of rows.
        device: &'static str,
        loaded: PerDevice<ChatModel>,
    },
    Server(Option<Box<Endpoint>>),
}

impl<'a> Asker<'a> {
    /// # Errors
    /// There is no such model, or the hub has to be asked for it and cannot be reached.
    pub fn new(
        cx: &mut StageContext,
        model: &'a LanguageModel,
        compat: Compat,
        max_failed_rows: usize,
    ) -> Result<Self, StageError> {
        let place = match &model.endpoint {
            Some(_) => Place::Server(None),
            None => {
                let identity = cx.model_identity(PLACE, &model.name())?;
                Place::Folder { identity, device: model.dtype.key(cx), loaded: PerDevice::new(cx) }
            }
        };
        Ok(Self { model, compat, place, max_failed_rows })
    }

    /// The rows of these conversations.
    pub fn job(&self, conversations: &[Vec<Message>]) -> RowJob {
        let model = self.model;
        let recipe = RowRecipe::new(NAMESPACE, ROW_VERSION);
        let (recipe, piece) = match &self.place {
            // Not the address: the same model elsewhere is the same.
            Place::Server(_) => (
                recipe
                    .text("served", &model.model)
                    .text("revision", model.revision.as_deref().unwrap_or_default())
                    .json("extra", &Value::Object(model.extra_body.clone())),
                PIECE_PER_REQUEST * model.concurrency,
            ),
            Place::Folder { identity, device, .. } => (
                recipe.text("model", identity).text("device", device),
                if *device == CPU { PIECE } else { PROMPTS_ON_DEVICE },
            ),
        };
        let decoding = json!({
            "compat": self.compat,
            "max_new_tokens": model.max_new_tokens,
            "max_attempts": model.max_attempts,
        });
        let recipe = recipe.json("decoding", &decoding);
        let key = |conversation: &Vec<Message>| recipe.row().json("conversation", &json!(conversation)).key();
        let length = |conversation: &Vec<Message>| conversation.iter().map(|m| m.content.len() as u64).sum();
        RowJob::new(NAMESPACE, "item", conversations.iter().map(key).collect())
            .batch(piece)
            .costs(conversations.iter().map(length).collect())
            .max_failed_rows(self.max_failed_rows)
    }

    /// The answer to each conversation, or why there is none.
    ///
    /// # Errors
    /// The model cannot be used; more conversations without an answer than may be.
    pub fn ask(
        &mut self,
        cx: &mut StageContext,
        conversations: &[Vec<Message>],
    ) -> Result<Vec<Result<Record, String>>, StageError> {
        let job = self.job(conversations);
        let (model, compat) = (self.model, self.compat);
        let start = |row: usize| Dialogue::new(conversations[row].clone(), compat, model.max_attempts);
        let rows = match &mut self.place {
            Place::Server(endpoint) => {
                let endpoint = match endpoint {
                    Some(endpoint) => endpoint,
                    None => {
                        let address = model.endpoint.as_deref().unwrap_or_default();
                        endpoint.insert(Box::new(Endpoint::new(address, model.endpoint_settings(), cx.stop_flag())?))
                    }
                };
                let rows = rows::run(cx, &job, |_: RowDevice| {
                    Ok(Served { endpoint, model, compat, start: &start, end: None })
                });
                if let Some(report) = endpoint.report() {
                    cx.info(report);
                }
                rows?
            }
            Place::Folder { loaded, .. } => {
                // Fetched from the hub where it is not at hand.
                let folder = cx.model(PLACE, &model.name())?;
                let (folder, loaded) = (folder.as_path(), &*loaded);
                rows::run(cx, &job, |device: RowDevice| {
                    let pool = device.pool()?;
                    let place = model.dtype.on(device.device);
                    let load = || pool.install(|| ChatModel::load_on(folder, place));
                    let chat = loaded.get(device.device, load)?;
                    Ok(Local { chat, pool, how: answering(model, compat), start: &start })
                })?
            }
        };
        let record = |bytes: &[u8]| {
            serde_json::from_slice(bytes).map_err(|e| StageError::bug(format!("a kept answer is not one: {e}")))
        };
        rows.iter()
            .map(|row| match row {
                Ok(bytes) => record(bytes).map(Ok),
                Err(failure) => Ok(Err(failure.message.clone())),
            })
            .collect()
    }
}

fn answering(model: &LanguageModel, compat: Compat) -> Answering {
    let mut template = Map::new();
    if !compat.is_reference() {
        // Five words need no reasoning; models that know no such setting pass over it.
        template.insert("enable_thinking".into(), Value::Bool(false));
    }
    let stop_at = (!compat.is_reference()).then_some(STOP);
    Answering { max_new: model.max_new_tokens as usize, stop_at, template }
}

fn bytes(dialogue: Dialogue) -> RowResult {
    serde_json::to_vec(&dialogue.into_record()).map_err(|e| RowFailure::new(e.to_string()))
}

/// A model on this machine.
struct Local<'a, S> {
    chat: &'a ChatModel,
    pool: rayon::ThreadPool,
    how: Answering,
    start: &'a S,
}

impl<S: Fn(usize) -> Dialogue + Sync> RowFunction for Local<'_, S> {
    fn compute(&mut self, rows: &[usize]) -> Result<Vec<(usize, RowResult)>, StageError> {
        let mut dialogues: Vec<Dialogue> = rows.iter().map(|row| (self.start)(*row)).collect();
        let mut failures: Vec<Option<RowFailure>> = vec![None; rows.len()];
        let mut open: Vec<usize> = (0..rows.len()).collect();
        while !open.is_empty() {
            let replies = self.replies(&open.iter().map(|at| dialogues[*at].messages()).collect::<Vec<_>>())?;
            let mut going = Vec::new();
            for (at, reply) in open.into_iter().zip(replies) {
                match reply {
                    Ok(reply) => {
                        if !dialogues[at].take(reply) {
                            going.push(at);
                        }
                    }
                    Err(failure) => failures[at] = Some(failure),
                }
            }
            open = going;
        }
        let results = dialogues.into_iter().zip(failures);
        let results = results.map(|(dialogue, failure)| failure.map_or_else(|| bytes(dialogue), Err));
        Ok(rows.iter().copied().zip(results).collect())
    }
}

impl<S: Sync> Local<'_, S> {
    /// The model's next turn in each conversation. One that it cannot take (too long) does not hold up the others.
    fn replies(&self, conversations: &[&[Message]]) -> Result<Vec<Result<Reply, RowFailure>>, StageError> {
        let threads = self.pool.current_num_threads();
        match self.pool.install(|| self.chat.answer(conversations, &self.how, threads)) {
            Ok(answers) => Ok(answers
                .into_iter()
                .map(|answer| {
                    Ok(Reply {
                        text: answer.text,
                        prompt_tokens: answer.prompt_tokens as u64,
                        answer_tokens: answer.answer_tokens as u64,
                    })
                })
                .collect()),
            Err(grlm_nn::Error::Argument { message, .. }) if conversations.len() == 1 => {
                Ok(vec![Err(RowFailure::new(message))])
            }
            Err(grlm_nn::Error::Argument { .. }) => {
                let alone = conversations.iter().map(|one| self.replies(std::slice::from_ref(one)));
                alone.collect::<Result<Vec<_>, _>>().map(|all| all.into_iter().flatten().collect())
            }
            Err(error) => Err(error.into()),
        }
    }
}

/// A server.
struct Served<'a, S> {
    endpoint: &'a Endpoint,
    model: &'a LanguageModel,
    compat: Compat,
    start: &'a S,
    /// Why nothing can be asked any more; told once everything that was answered is kept.
    end: Option<StageError>,
}

impl<S: Fn(usize) -> Dialogue + Sync> RowFunction for Served<'_, S> {
    fn compute(&mut self, rows: &[usize]) -> Result<Vec<(usize, RowResult)>, StageError> {
        let answers = self.endpoint.each(rows, |row| {
            let mut dialogue = (self.start)(*row);
            loop {
                let reply = self.endpoint.post("chat/completions", self.body(dialogue.messages()), reply)?;
                if dialogue.take(reply) {
                    return Ok(dialogue);
                }
            }
        });
        let gathered = gather(answers);
        self.end = gathered.end;
        let results = gathered.results.into_iter().map(|result| result.and_then(bytes));
        Ok(rows.iter().copied().zip(results).collect())
    }

    fn end(&mut self) -> Option<StageError> {
        self.end.take()
    }
}

impl<S> Served<'_, S> {
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
    Ok(Reply { text, prompt_tokens: tokens("prompt_tokens"), answer_tokens: tokens("completion_tokens") })
}
