use grlm_nn::{Tokenizer, tokenizer::special};
use serde_json::json;

use super::{Layout, Settings};
use crate::{
    Compat,
    artifact::{ChatTemplate, SftFormat, TidRecord, TokenKind},
    lm::{Sample, prefixes},
    sft::rec_text::{self, Place},
};

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
                let mut tokens = layout.prompt(&history, Compat::Fixed, 0).unwrap().tokens;
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
        assert!(prompt.dropped > 0);
        let prompt = prompt.tokens;
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
        assert!(text.contains("Name it\nword") && text.contains("[soap, olive, bar, hand, mild]<|im_end|>"), "{text}");
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
