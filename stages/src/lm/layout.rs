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

use super::{
    prefixes,
    samples::{Sample, Shape, content, items},
};
use crate::{
    Compat, StageError,
    artifact::{ChatTemplate, CheckpointInfo, SftFormat, TidRecord, TokenKind},
    sft::rec_text::{self, Place, TID_LABEL},
};

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

/// A sample in tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Laid {
    pub tokens: Vec<u32>,
    /// The first token that the model learns to write.
    pub learned_from: usize,
    /// Whether it was longer than allowed, and lost its oldest items or the end of its prompt.
    pub cut: bool,
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
    fn line(&self, line: &str) -> Result<Vec<u32>, StageError> {
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

    /// The prompt after which the model writes the TID of the next item, given the items so far, oldest first. The
    /// oldest are left out until `room` tokens are free for the answer.
    ///
    /// # Errors
    /// The history is empty, or not even its last item fits.
    pub fn prompt(&self, history: &[&TidRecord], compat: Compat, room: usize) -> Result<Vec<u32>, StageError> {
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
            return if kept == 0 { Err(self.no_room(limit)) } else { Ok(tokens) };
        }
        while first < history.len() {
            let tokens = self.text_prompt(&history[first..], compat)?;
            if tokens.len() <= limit {
                return Ok(tokens);
            }
            let excess = (tokens.len() - limit) * (history.len() - first) / tokens.len();
            first += excess.max(1);
        }
        Err(self.no_room(limit))
    }

    fn no_room(&self, limit: usize) -> StageError {
        StageError::params(format!("not even the last item of a history fits into {limit} tokens"))
            .help("train with a greater `max_length`")
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

fn user_turn_start() -> String {
    format!("{}user\n", special::TURN_START)
}

fn joined((mut tokens, response): (Vec<u32>, Vec<u32>), cut: bool) -> Laid {
    let learned_from = tokens.len();
    tokens.extend(response);
    Laid { tokens, learned_from, cut }
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn record(words: [&str; 5], title: Option<&str>) -> TidRecord {
        let mut value = json!({"id": words[0], "summary_words": words});
        if let Some(title) = title {
            value["title"] = title.into();
        }
        TidRecord::from_value(value).unwrap()
    }

    fn catalogue() -> Vec<TidRecord> {
        vec![
            record(["hair-mask", "repair", "argan", "oil", "c++"], Some("A mask [500 ml]")),
            record(["soap", "olive", "bar", "hand", "mild"], None),
            record(["brush", "hair", "bristle", "boar", "über"], Some("Brush")),
            record(["soap", "lavender", "bar", "hand", "!"], Some(".hidden")),
        ]
    }

    /// A sample as `sft_rec` writes it.
    fn sample(format: SftFormat, history: &[&TidRecord]) -> Sample {
        let mut sample = Sample::default();
        for (i, record) in history.iter().enumerate() {
            match format {
                SftFormat::Compact => rec_text::push_compact(&mut sample.output, record),
                SftFormat::Text if i == 0 => {
                    sample.instruction = "Go on.\n".into();
                    rec_text::push_text(&mut sample.input, record, Place::First, Compat::Fixed);
                }
                SftFormat::Text => rec_text::push_text(&mut sample.output, record, Place::Later, Compat::Fixed),
            }
        }
        sample
    }

    fn layout(format: SftFormat, tokens: TokenKind, template: ChatTemplate, max_length: usize) -> Layout {
        let catalogue = catalogue();
        let all: Vec<&TidRecord> = catalogue.iter().collect();
        let (tokenizer, bos) = match tokens {
            TokenKind::Words => {
                let mut words: Vec<&str> = catalogue.iter().flat_map(|r| r.clean_words()).collect();
                words.sort_unstable();
                words.dedup();
                (Tokenizer::of_words(words).unwrap(), Some(special::WORDS_START.to_owned()))
            }
            TokenKind::Prefixes => {
                let tids = catalogue.iter().map(|r| r.clean_words().collect()).collect();
                let names = prefixes::vocabulary(&tids);
                let tokenizer = Tokenizer::of_words(names.iter().map(String::as_str)).unwrap();
                (tokenizer, Some(special::WORDS_START.to_owned()))
            }
            TokenKind::Model => {
                let text = sample(SftFormat::Text, &all);
                let texts = [text.content(), text.output];
                let tokenizer = Tokenizer::learn(texts.iter().map(String::as_str), 320).unwrap();
                (tokenizer, (template == ChatTemplate::None).then(|| special::TEXT_START.to_owned()))
            }
        };
        let instruction = if format == SftFormat::Text { "Go on.\n".to_owned() } else { String::new() };
        let settings = Settings { format, tokens, template, bos, instruction, max_length };
        Layout::new(tokenizer, settings).unwrap()
    }

    fn layouts() -> impl Iterator<Item = Layout> {
        let templates = [ChatTemplate::None, ChatTemplate::Qwen3Nothink, ChatTemplate::Qwen3];
        let of_words = [TokenKind::Words, TokenKind::Prefixes];
        let mut all = Vec::from(of_words.map(|t| layout(SftFormat::Compact, t, ChatTemplate::None, 1000)));
        for format in [SftFormat::Text, SftFormat::Compact] {
            all.extend(templates.map(|template| layout(format, TokenKind::Model, template, 1000)));
        }
        all.into_iter()
    }

    #[test]
    fn prompt_and_tid_are_the_beginning_of_what_training_sees() {
        let catalogue = catalogue();
        for layout in layouts() {
            let format = layout.settings.format;
            for length in 1..catalogue.len() {
                for next in &catalogue {
                    let history: Vec<&TidRecord> = catalogue[..length].iter().collect();
                    let longer: Vec<&TidRecord> = history.iter().copied().chain([next]).collect();
                    let laid = layout.sample(&sample(format, &longer)).unwrap();
                    let mut tokens = layout.prompt(&history, Compat::Fixed, 0).unwrap();
                    if format == SftFormat::Text || length > 0 {
                        assert!(tokens.len() >= laid.learned_from, "the answer is in the learned part");
                    }
                    let tid = layout.tid(next, Compat::Fixed).unwrap().unwrap();
                    tokens.extend(&tid);
                    assert!(laid.tokens.starts_with(&tokens), "{:?}", layout.settings);
                    // And it ends with the TID: nothing of a title, nothing of a next item.
                    let text = layout.tokenizer.decode(&tid).unwrap();
                    let words = next.clean_words().collect::<Vec<_>>();
                    match (format, layout.settings.tokens) {
                        (SftFormat::Text, _) => assert_eq!(text.trim_end(), format!(" [{}]", words.join(", "))),
                        (_, TokenKind::Model) => assert_eq!(text, words.join(" ") + "\n"),
                        (_, TokenKind::Words) => assert_eq!(tid.len(), 5),
                        (_, TokenKind::Prefixes) => assert!(text.ends_with(&words.join(",")) && tid.len() < 3),
                    }
                }
            }
        }
    }

    #[test]
    fn samples_are_rendered_as_llamafactory_renders_them() {
        let catalogue = catalogue();
        let sample = sample(SftFormat::Text, &[&catalogue[1], &catalogue[2]]);
        let render = |template| {
            let layout = layout(SftFormat::Text, TokenKind::Model, template, 1000);
            let laid = layout.sample(&sample).unwrap();
            let (prompt, response) = laid.tokens.split_at(laid.learned_from);
            (layout.tokenizer.decode(prompt).unwrap(), layout.tokenizer.decode(response).unwrap())
        };
        let asked = "Go on.\n\nItem text ID: [soap, olive, bar, hand, mild]\n";
        let answer = "Item text ID: [brush, hair, bristle, boar, über] Title: Brush.\n";
        assert_eq!(render(ChatTemplate::None), (format!("<|endoftext|>{asked}"), format!("{answer}<|im_end|>")));
        let user = format!("<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n");
        assert_eq!(render(ChatTemplate::Qwen3Nothink), (user.clone(), format!("{answer}<|im_end|>\n")));
        assert_eq!(render(ChatTemplate::Qwen3), (user, format!("<think>\n\n</think>\n\n{answer}<|im_end|>\n")));
    }

    #[test]
    fn long_histories_lose_their_oldest_items_in_training_and_in_prompts() {
        let catalogue = catalogue();
        let history: Vec<&TidRecord> = catalogue.iter().cycle().take(12).collect();
        for whole in layouts() {
            let settings = &whole.settings;
            let full = whole.sample(&sample(settings.format, &history)).unwrap();
            assert!(!full.cut);
            let limit = full.tokens.len() * 2 / 3;
            let short = layout(settings.format, settings.tokens, settings.template, limit);
            let laid = short.sample(&sample(settings.format, &history)).unwrap();
            assert!(laid.cut && laid.tokens.len() <= limit && laid.learned_from < laid.tokens.len());
            let tail = 20.min(laid.tokens.len() / 2);
            assert!(laid.tokens.ends_with(&full.tokens[full.tokens.len() - tail..]), "the newest items stay");
            let room = 30.min(limit / 3);
            let prompt = short.prompt(&history, Compat::Fixed, room).unwrap();
            assert!(prompt.len() + room <= limit);
            assert!(short.prompt(&history, Compat::Fixed, limit).is_err());
        }
    }

    #[test]
    fn other_long_samples_lose_the_end_of_their_prompt() {
        let long = Sample {
            instruction: "Name it".into(),
            input: "word ".repeat(200),
            output: "[soap, olive, bar, hand, mild]".into(),
        };
        for template in [ChatTemplate::None, ChatTemplate::Qwen3] {
            let layout = layout(SftFormat::Text, TokenKind::Model, template, 150);
            let laid = layout.sample(&long).unwrap();
            assert!(laid.cut);
            assert_eq!(laid.tokens.len(), 150);
            let text = layout.tokenizer.decode(&laid.tokens).unwrap();
            assert!(
                text.contains("Name it\nword") && text.contains("[soap, olive, bar, hand, mild]<|im_end|>"),
                "{text}"
            );
            if template == ChatTemplate::Qwen3 {
                assert!(text.contains("<|im_end|>\n<|im_start|>assistant\n<think>"), "{text}");
            }
            let only_output = Sample { output: "word ".repeat(300), ..Sample::default() };
            let laid = layout.sample(&only_output).unwrap();
            assert!(laid.cut && laid.tokens.len() == 150 && laid.learned_from < 150);
        }
    }

    #[test]
    fn a_tid_with_an_unknown_word_cannot_be_written() {
        for tokens in [TokenKind::Words, TokenKind::Prefixes] {
            let layout = layout(SftFormat::Compact, tokens, ChatTemplate::None, 100);
            let unknown = record(["soap", "olive", "bar", "hand", "new"], None);
            assert_eq!(layout.tid(&unknown, Compat::Fixed).unwrap(), None);
        }
    }

    #[test]
    fn a_tokenizer_that_does_not_fit_is_refused() {
        let fits = layout(SftFormat::Compact, TokenKind::Words, ChatTemplate::None, 100);
        let refused = |tokenizer: Tokenizer, edit: &dyn Fn(&mut Settings)| {
            let mut settings = fits.settings.clone();
            edit(&mut settings);
            Layout::new(tokenizer, settings).err().expect("refused").to_string()
        };
        let words = fits.tokenizer.clone();
        assert!(refused(words.clone(), &|s| s.bos = Some("<start>".into())).contains("<start>"));
        let chat = |s: &mut Settings| (s.tokens, s.template) = (TokenKind::Model, ChatTemplate::Qwen3);
        assert!(refused(words, &chat).contains("<|im_start|>"));
        let bytes = layout(SftFormat::Text, TokenKind::Model, ChatTemplate::None, 100).tokenizer;
        assert!(refused(bytes, &|s| s.bos = None).contains("not one of words"));
    }
}
