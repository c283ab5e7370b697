//! Questions as rows: put to a model on this machine, or to a server that speaks OpenAI's `/v1/chat/completions`.
//!
//! A row is one answer, kept under the whole conversation that it answers. What is asked about an answer is a longer
//! conversation, and so another row: how often may be asked is in no key, and more attempts go on from the answers
//! that there are.

use std::{
    path::Path,
    sync::{Mutex, MutexGuard, OnceLock, PoisonError},
};

use grlm_nn::{
    chat::{Answer, Answering, ChatModel, Message},
    generate::PROMPTS_ON_DEVICE,
};
use serde_json::{Map, Value, json};

use super::{
    super::Found,
    LanguageModel,
    dialogue::{Dialogue, Record, Reply},
    served::{Served, TEMPLATE_SETTINGS},
};
use crate::{
    Compat, StageContext, StageError,
    artifact::{ItemId, text},
    compute::{CPU, PerDevice},
    endpoint::Endpoint,
    rows::{self, RowDevice, RowFailure, RowFunction, RowJob, RowRecipe, RowResult},
};

/// The parameter that names the model.
pub const PLACE: &str = "extractor.model";
const NAMESPACE: &str = "tid-answer";
/// Raised when the code of this folder, of `parse` or of the chat model changes what an item's answer is.
const ROW_VERSION: u32 = 2;
/// Conversations that the CPU gets at a time; a GPU gets as many as it may have in work together.
const PIECE: usize = 32;
/// Where answers end.
pub(super) const STOP: char = ']';
/// Characters of an answer that an error shows.
const SHOWN: usize = 100;
/// So many first answers without a word are no accident.
const MANY: u64 = 16;

/// A model to be asked.
pub struct Asker<'a> {
    model: &'a LanguageModel,
    compat: Compat,
    place: Place,
    max_failed_rows: usize,
    /// Whether the server takes [`TEMPLATE_SETTINGS`], once that is known.
    takes_settings: OnceLock<bool>,
    tally: Mutex<Tally>,
    /// A warning tells that the model says nothing.
    told_silent: bool,
}

/// What the model was asked in this run.
#[derive(Debug, Clone, Copy, Default)]
pub struct Tally {
    pub answers: u64,
    /// Answers that were not asked for: they are kept from earlier.
    pub known: u64,
    /// Those without a word.
    silent: u64,
    pub prompt_tokens: u64,
    pub answer_tokens: u64,
}

/// One question to each of some conversations.
#[derive(Clone, Copy)]
struct Round {
    /// It is the first one, of items; others go on from answers that there are.
    first: bool,
    /// How many may be left without an answer.
    may_fail: usize,
    /// A model that says nothing to any of them is of no use.
    must_speak: bool,
}

impl Round {
    /// A question about answers, which stay where it has none.
    const FURTHER: Self = Self { first: false, may_fail: usize::MAX, must_speak: false };
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
        let (takes_settings, tally) = (OnceLock::new(), Mutex::default());
        Ok(Self { model, compat, place, max_failed_rows, takes_settings, tally, told_silent: false })
    }

    /// The rows of the first questions, one for each of these conversations.
    pub fn job<C: AsRef<[Message]>>(&self, conversations: &[C]) -> RowJob {
        let model = self.model;
        let recipe = RowRecipe::new(NAMESPACE, ROW_VERSION);
        let recipe = match &self.place {
            // Not the address: the same model elsewhere is the same.
            Place::Server(_) => recipe
                .text("served", &model.model)
                .text("revision", model.revision.as_deref().unwrap_or_default())
                .json("extra", &Value::Object(model.extra_body.clone())),
            Place::Folder { identity, device, .. } => recipe.text("model", identity).text("device", device),
        };
        let decoding = json!({
            "compat": self.compat,
            "max_new_tokens": model.max_new_tokens,
        });
        let recipe = recipe.json("decoding", &decoding);
        let key = |conversation: &C| recipe.row().json("conversation", &json!(conversation.as_ref())).key();
        let length = |conversation: &C| conversation.as_ref().iter().map(|m| m.content.len() as u64).sum();
        let job = RowJob::new(NAMESPACE, "item", conversations.iter().map(key).collect())
            .costs(conversations.iter().map(length).collect())
            .max_failed_rows(self.max_failed_rows);
        match &self.place {
            Place::Server(_) => job.batch(1).requests(model.concurrency),
            Place::Folder { device, .. } => job.batch(if *device == CPU { PIECE } else { PROMPTS_ON_DEVICE }),
        }
    }

    /// What the model said to each item's prompt at last, or why it said nothing. `names` are the items'. An answer
    /// stays where a further question about it has none.
    ///
    /// # Errors
    /// The model cannot be used, or has no word for any item; more items without an answer than may be.
    pub fn ask(
        &mut self,
        cx: &mut StageContext,
        names: &[String],
        prompts: &[Vec<Message>],
    ) -> Result<Vec<Result<Record, String>>, StageError> {
        let reference = self.compat.is_reference();
        self.converse(cx, names, prompts, Round { first: true, may_fail: self.max_failed_rows, must_speak: !reference })
    }

    /// The same for questions about items that have an answer already, and keep it where there is no other.
    ///
    /// # Errors
    /// The model cannot be used.
    pub fn ask_further(
        &mut self,
        cx: &mut StageContext,
        names: &[String],
        questions: &[Vec<Message>],
    ) -> Result<Vec<Result<Record, String>>, StageError> {
        self.converse(cx, names, questions, Round::FURTHER)
    }

    /// What to say of a model that had five words for none of the items that it `answered` for; `one` of them says why.
    /// Nothing where a warning tells already that it says nothing.
    pub fn in_vain(&self, answered: usize, one: &ItemId, why: &Found) -> Option<String> {
        // The published script takes what it gets.
        if self.compat.is_reference() || self.told_silent {
            return None;
        }
        let (model, reason) = (&self.model.model, why.problem.as_deref().unwrap_or_default());
        let said = match on_one_line(&why.output) {
            line if line.is_empty() => line,
            line => format!(" (`{}`)", text::beginning(&line, SHOWN)),
        };
        Some(format!(
            "`{model}` has five words for none of {answered} items; item `{one}`: {reason}{said}; raise \
             `max_new_tokens`, mend the `tid_extraction` text (input `prompts`), or take a larger model"
        ))
    }

    /// What was asked until now.
    pub fn tally(&self) -> Tally {
        *locked(&self.tally)
    }

    fn converse(
        &mut self,
        cx: &mut StageContext,
        names: &[String],
        conversations: &[Vec<Message>],
        mut round: Round,
    ) -> Result<Vec<Result<Record, String>>, StageError> {
        let dialogue = |begun: &Vec<Message>| Dialogue::new(begun.clone(), self.compat, self.model.max_attempts);
        let mut dialogues: Vec<Dialogue> = conversations.iter().map(dialogue).collect();
        let mut failures: Vec<Option<String>> = vec![None; dialogues.len()];
        let mut open: Vec<usize> = (0..dialogues.len()).collect();
        while !open.is_empty() {
            let asked: Vec<&[Message]> = open.iter().map(|at| dialogues[*at].messages()).collect();
            let names = open.iter().map(|at| names[*at].clone()).collect();
            let replies = self.replies(cx, names, &asked, &round)?;
            let mut going = Vec::new();
            for (at, reply) in open.into_iter().zip(replies) {
                match reply {
                    Ok(reply) => {
                        if !dialogues[at].take(reply) {
                            going.push(at);
                        }
                    }
                    // That the question cannot be asked again takes nothing from the answer that there is.
                    Err(_) if dialogues[at].has_answer() => {}
                    Err(failure) => failures[at] = Some(failure),
                }
            }
            open = going;
            round = Round::FURTHER;
        }
        let records = dialogues.into_iter().map(Dialogue::into_record);
        Ok(records.zip(failures).map(|(record, failure)| failure.map_or(Ok(record), Err)).collect())
    }

    /// The answer to each conversation, or why there is none.
    fn replies(
        &mut self,
        cx: &mut StageContext,
        names: Vec<String>,
        conversations: &[&[Message]],
        round: &Round,
    ) -> Result<Vec<Result<Reply, String>>, StageError> {
        let mut job = self.job(conversations).names(names).max_failed_rows(round.may_fail);
        if !round.first {
            "question".clone_into(&mut job.unit);
        }
        let (model, compat) = (self.model, self.compat);
        let (tally, must_speak, name) = (&self.tally, round.must_speak, model.model.as_str());
        let rows = match &mut self.place {
            Place::Server(endpoint) => {
                let endpoint: &Endpoint = endpoint.get_or_insert_with(|| {
                    let address = model.endpoint.as_deref().unwrap_or_default();
                    Box::new(Endpoint::new(address, model.endpoint_settings(), cx.stop_flag()))
                });
                let takes_settings = &self.takes_settings;
                let before = takes_settings.get().copied();
                let rows = rows::run(cx, &job, |device: RowDevice| {
                    endpoint.tell_by(&device.notes);
                    let function = Served { endpoint, model, compat, conversations, takes_settings };
                    Ok(Counted { function, tally, must_speak, name, endpoint: Some(endpoint) })
                });
                if before.is_none() && takes_settings.get() == Some(&false) {
                    cx.info(format!("the server takes no `{TEMPLATE_SETTINGS}`: requests go without"));
                }
                let rows = endpoint.conclude(cx, &job, rows)?;
                if must_speak && rows.known() > 0 {
                    cx.info(format!(
                        "{} answers of `{name}` were asked for earlier, of this server or another; if it is another model \
                         by that name, say so by `revision`",
                        rows.known()
                    ));
                }
                rows
            }
            Place::Folder { loaded, .. } => {
                // Fetched from the hub where it is not at hand.
                let folder = cx.model(PLACE, &model.name())?;
                let (folder, loaded) = (folder.as_path(), &*loaded);
                rows::run(cx, &job, |device: RowDevice| {
                    let pool = device.pool()?;
                    let place = model.dtype.on(device.device);
                    let mut how = answering(model, compat);
                    let load = || pool.install(|| ChatModel::load_on(folder, place, &how.template));
                    let chat = loaded.get(device.device, load)?;
                    if round.first {
                        check_some_fit(chat, folder, &how, conversations)?;
                    }
                    // Half of what is free once the weights are there.
                    how.memory = device.free_memory().map(|bytes| bytes as usize / 2);
                    let function = Local { chat, folder, pool, how, conversations };
                    Ok(Counted { function, tally, must_speak, name, endpoint: None })
                })?
            }
        };
        locked(&self.tally).known += rows.known() as u64;
        let replies = rows.iter().map(|row| match row {
            Ok(bytes) => kept(bytes).map(Ok),
            Err(failure) => Ok(Err(failure.message.clone())),
        });
        let replies = replies.collect::<Result<Vec<Result<Reply, String>>, StageError>>()?;
        let answers = replies.iter().flatten().count() as u64;
        if must_speak && answers > 0 && replies.iter().flatten().all(Reply::is_silent) {
            match silence(name, answers) {
                error if answers >= MANY => return Err(error),
                error => cx.warn(error.to_string()),
            }
            self.told_silent = true;
        }
        Ok(replies)
    }
}

/// A prompt that the model cannot take is its item's failure; that it can take none is the model's, or the settings'.
///
/// # Errors
/// It can take none.
fn check_some_fit(
    chat: &ChatModel,
    folder: &Path,
    how: &Answering,
    conversations: &[&[Message]],
) -> Result<(), StageError> {
    let length = |conversation: &&[Message]| conversation.iter().map(|m| m.content.len()).sum::<usize>();
    let mut by_length = conversations.to_vec();
    by_length.sort_by_key(length);
    // As a rule the first fits, and the others are not looked at.
    let mut refused = None;
    for conversation in by_length {
        match chat.prompt_with_room(conversation, how) {
            Ok(_) => return Ok(()),
            Err(error) => refused.get_or_insert(error),
        };
    }
    let (why, help) = match refused {
        None => return Ok(()),
        Some(grlm_nn::Error::Argument { message, help }) => (message, help),
        Some(other) => return Err(other.into()),
    };
    let which = match conversations.len() {
        1 => "the model cannot take the only prompt".to_owned(),
        all => format!("the model can take none of {all} prompts, not even the shortest"),
    };
    Err(StageError::Input { path: folder.to_owned(), line: None, message: format!("{which}: {why}"), help })
}

fn on_one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The model says nothing, and would be asked about all the others in vain.
fn silence(model: &str, answers: u64) -> StageError {
    let message = format!("`{model}` says nothing: {answers} answers, all empty or reasoning without an end");
    StageError::FailedRows { message, help: None }
        .help("switch its reasoning off (`extra_body`), or give it room for it (`max_new_tokens`): see docs/models.md")
}

fn answering(model: &LanguageModel, compat: Compat) -> Answering {
    let template = if compat.is_reference() { Map::new() } else { no_reasoning() };
    let stop_at = (!compat.is_reference()).then_some(STOP);
    Answering { max_new: model.max_new_tokens as usize, stop_at, memory: None, template }
}

/// Settings of the chat template: five words need no reasoning. Models that know no such setting pass over it.
pub(super) fn no_reasoning() -> Map<String, Value> {
    Map::from_iter([("enable_thinking".to_owned(), Value::Bool(false))])
}

pub(super) fn bytes(reply: Reply) -> RowResult {
    serde_json::to_vec(&reply).map_err(|e| RowFailure::new(e.to_string()))
}

fn kept(bytes: &[u8]) -> Result<Reply, StageError> {
    serde_json::from_slice(bytes).map_err(|e| StageError::bug(format!("a kept answer is not one: {e}")))
}

fn locked(tally: &Mutex<Tally>) -> MutexGuard<'_, Tally> {
    // Whole between calls, so a panic elsewhere does no harm.
    tally.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Counts what `function` computes, and ends the stage early where the model says nothing.
struct Counted<'a, F> {
    function: F,
    tally: &'a Mutex<Tally>,
    must_speak: bool,
    /// The model's.
    name: &'a str,
    /// The server that is asked, if one is.
    endpoint: Option<&'a Endpoint>,
}

impl<F: RowFunction> RowFunction for Counted<'_, F> {
    fn compute(&mut self, rows: &[usize]) -> Result<Vec<(usize, RowResult)>, StageError> {
        let results = self.function.compute(rows)?;
        let mut tally = locked(self.tally);
        for bytes in results.iter().filter_map(|(_, result)| result.as_ref().ok()) {
            let reply = kept(bytes)?;
            tally.answers += 1;
            tally.silent += u64::from(reply.is_silent());
            tally.prompt_tokens += reply.prompt_tokens;
            tally.answer_tokens += reply.answer_tokens;
        }
        Ok(results)
    }

    fn free_memory(&mut self) {
        self.function.free_memory();
    }

    fn end(&mut self) -> Option<StageError> {
        let tally = locked(self.tally);
        let silent = self.must_speak && tally.answers >= MANY && tally.silent == tally.answers;
        if !silent {
            return self.function.end();
        }
        let error = silence(self.name, tally.answers);
        // Others may wait for a turn.
        Some(match self.endpoint {
            Some(endpoint) => endpoint.end(error),
            None => error,
        })
    }
}

/// A model on this machine.
struct Local<'a> {
    chat: &'a ChatModel,
    folder: &'a Path,
    pool: rayon::ThreadPool,
    how: Answering,
    conversations: &'a [&'a [Message]],
}

impl RowFunction for Local<'_> {
    fn compute(&mut self, rows: &[usize]) -> Result<Vec<(usize, RowResult)>, StageError> {
        let conversations: Vec<&[Message]> = rows.iter().map(|row| self.conversations[*row]).collect();
        let threads = self.pool.current_num_threads();
        let answers = self.pool.install(|| self.chat.answer(&conversations, &self.how, threads));
        let answers = answers.map_err(|error| error.of_model(self.folder))?;
        Ok(rows.iter().copied().zip(answers.into_iter().map(said)).collect())
    }
}

/// The model's next turn in a conversation. One that it cannot take (too long) does not hold up the others.
fn said(answer: Result<Answer, grlm_nn::Error>) -> RowResult {
    match answer {
        Ok(answer) => bytes(Reply {
            text: answer.text,
            cut: answer.cut,
            prompt_tokens: answer.prompt_tokens as u64,
            answer_tokens: answer.answer_tokens as u64,
        }),
        Err(grlm_nn::Error::Argument { message, help: Some(help) }) => {
            Err(RowFailure::new(format!("{message}: {help}")))
        }
        Err(error) => Err(RowFailure::new(error.to_string())),
    }
}
